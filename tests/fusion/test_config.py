"""What a fusion's members may be called."""

from __future__ import annotations

import json

import pytest

from fusionserve.artifact_folders import FUSION_CONFIG
from fusionserve.config import EMBEDDED_FUSIONS
from fusionserve.errors import ArtifactError
from fusionserve.fusion.config import parse_fusion_config


@pytest.mark.parametrize("base_member", [False, True])
@pytest.mark.parametrize("name", ["base", "other", "A"])
def test_member_that_no_adapter_can_be_is_refused(name: str, base_member: bool) -> None:
    (directory,) = EMBEDDED_FUSIONS.iterdir()
    fields = json.loads((directory / FUSION_CONFIG).read_text())
    assert len(parse_fusion_config(json.dumps(fields).encode()).members) == len(fields["members"])
    fields["members"][0]["name"] = name
    fields["base_member"] = base_member
    with pytest.raises(ArtifactError, match="which no adapter can be") as refusal:
        parse_fusion_config(json.dumps(fields).encode())
    assert refusal.value.reason == "CONFIG_MALFORMED"
