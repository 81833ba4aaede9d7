"""Valid inputs that fuzzing starts from, and the corpus of wrong ones."""

from __future__ import annotations

import json

import torch
from bad_requests import GENERATE, STREAM, corpus
from fuzz_artifacts import ADAPTER, FUSION, Artifact
from fuzz_requests import REQUESTS
from lora_files import DOWN_PROJ, EMBEDDING, HIDDEN, INNER, PREFIX, Q_PROJ, VOCAB, make_config, make_pair
from random_fusions import make_base, make_member, make_trained
from random_fusions import make_config as make_fusion_config
from safetensors.torch import save
from torch import Tensor

from fusionserve.fusion.config import Scope, ValueKind

_MAX_SEED_BYTES = 4096


def artifacts() -> list[bytes]:
    """Adapters with every optional part, and fusions of every kind."""
    return [*_adapters(), *_fusions()]


def requests() -> list[bytes]:
    """What the corpus of bad requests sends, as far as it is small."""
    by_path = {GENERATE: 0, STREAM: 1}
    for index, kind in enumerate(REQUESTS):
        service = "AdapterService" if index >= 4 else "InferenceService"
        name = kind.DESCRIPTOR.name.removesuffix("Request")
        by_path[f"/fusionserve.v1.{service}/{name}"] = index
    cases = [case for case in corpus() if case.method in by_path and len(case.request) < _MAX_SEED_BYTES]
    return [bytes([by_path[case.method]]) + case.request for case in cases]


def _adapters() -> list[bytes]:
    q, down = make_pair(Q_PROJ, HIDDEN, HIDDEN), make_pair(DOWN_PROJ, INNER, HIDDEN, seed=1)
    module = f"{PREFIX}{Q_PROJ}"
    parts: list[tuple[dict[str, object], dict[str, Tensor]]] = [
        ({}, {**q, **down}),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 8}}, q),
        ({"lora_bias": True}, {**q, f"{module}.lora_B.bias": torch.ones(HIDDEN)}),
        ({"use_dora": True}, {**q, f"{module}.lora_magnitude_vector": torch.ones(HIDDEN)}),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, q),
        ({"modules_to_save": ["lm_head"]}, {**q, f"{PREFIX}lm_head.weight": torch.zeros(VOCAB, HIDDEN)}),
        (
            {"target_modules": ["embed_tokens"]},
            {
                f"{PREFIX}{EMBEDDING}.lora_embedding_A": torch.ones(2, VOCAB),
                f"{PREFIX}{EMBEDDING}.lora_embedding_B": torch.ones(HIDDEN, 2),
            },
        ),
        ({}, {name: tensor.bfloat16() for name, tensor in q.items()}),
        ({"peft_type": "IA3"}, q),
        ({"bias": "all"}, q),
        ({"base_model_name_or_path": "other/model"}, q),
    ]
    return [
        Artifact(ADAPTER, json.dumps(make_config(**config)).encode(), save(tensors)).pack()
        for config, tensors in parts
    ]


def _fusions() -> list[bytes]:
    base = make_base()
    members = [make_member(base, seed, (2, 2, 2, 2)) for seed in (0, 1)]
    inputs = []
    for number, changes in enumerate(
        (
            {},
            {"scope": Scope.MODULE},
            {"value": ValueKind.DIAGONAL, "member_keys": False},
            {"value": ValueKind.LOW_RANK, "value_rank": 2, "base_member": True, "temperature": 0.5},
        )
    ):
        config = make_fusion_config(base, members, **changes)
        tensors = {
            name: tensor.detach().float().contiguous()
            for name, tensor in make_trained(config, base, number).named_tensors()
        }
        inputs.append(Artifact(FUSION, config.to_json().encode(), save(tensors)).pack())
    return inputs
