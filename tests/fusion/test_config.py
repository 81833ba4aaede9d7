"""What a fusion's members may be called, and what is told of them."""

from __future__ import annotations

import json

import pytest

from fusionserve.artifact_folders import FUSION_CONFIG
from fusionserve.config import EMBEDDED_FUSIONS
from fusionserve.errors import ArtifactError
from fusionserve.fusion.config import FusionConfig, parse_fusion_config


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


def parse_members(**changes: object) -> FusionConfig:
    """The shipped fusion's configuration with its first member changed; None leaves a field out."""
    (directory,) = EMBEDDED_FUSIONS.iterdir()
    fields = json.loads((directory / FUSION_CONFIG).read_text())
    first = {**fields["members"][0], **changes}
    fields["members"][0] = {key: value for key, value in first.items() if value is not None}
    return parse_fusion_config(json.dumps(fields).encode())


@pytest.mark.parametrize("digest", [None, "0" * 64])
def test_the_digest_of_the_scalings_is_kept_and_may_be_missing(digest: str | None) -> None:
    config = parse_members(scalings_sha256=digest)
    assert config.members[0].scalings_digest == digest
    assert parse_fusion_config(config.to_json().encode()) == config


@pytest.mark.parametrize("digest", [3, "0" * 63, "A" * 64])
def test_a_digest_of_the_scalings_that_is_none_is_refused(digest: object) -> None:
    with pytest.raises(ArtifactError, match="scalings_sha256") as refusal:
        parse_members(scalings_sha256=digest)
    assert refusal.value.reason == "CONFIG_MALFORMED"
