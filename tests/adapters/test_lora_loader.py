"""The loader on hand-made directories: scaling folded in, and every reason to refuse."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from lora_files import (
    DOWN_PROJ,
    EMBEDDING,
    HIDDEN,
    INNER,
    LM_HEAD,
    PREFIX,
    Q_PROJ,
    VOCAB,
    encode_safetensors,
    load_directory,
    make_base_modules,
    make_config,
    make_pair,
    make_tensors,
    write_adapter,
)
from pinned_memory import count_pinned, is_pinned
from torch import Tensor

from fusionserve.adapters.lora_loader import WEIGHTS_FILE
from fusionserve.adapters.pinned_memory import pinned_bytes, pinned_memory
from fusionserve.errors import ArtifactError, CapacityError, FusionServeError

A = f"{PREFIX}{Q_PROJ}.lora_A.weight"
B = f"{PREFIX}{Q_PROJ}.lora_B.weight"
BIAS = f"{PREFIX}{Q_PROJ}.lora_B.bias"
MAGNITUDE = f"{PREFIX}{Q_PROJ}.lora_magnitude_vector"
HEAD = f"{PREFIX}{LM_HEAD}.weight"

PAIR = make_pair(Q_PROJ, HIDDEN, HIDDEN)
ONES = torch.ones(HIDDEN)
WHOLE_HEAD = {HEAD: torch.ones(VOCAB, HIDDEN)}


def refusal_of(directory: Path, **options: object) -> FusionServeError:
    with pytest.raises(FusionServeError) as refusal:
        load_directory(directory, **options)
    assert str(directory) not in refusal.value.message
    return refusal.value


def scalings_of(directory: Path, **changes: object) -> str:
    weights = load_directory(write_adapter(directory, config=make_config(**changes)))
    return weights.scalings_digest


def test_digest_of_the_scalings_is_over_paths_and_hexadecimal_numbers(tmp_path: Path) -> None:
    """Fusions on disk have it, so its form may not change."""
    found = scalings_of(tmp_path, alpha_pattern={"down_proj": 0.2})
    text = "model.layers.0.self_attn.q_proj 0x1.0000000000000p+1\n"
    text += "model.layers.1.mlp.down_proj 0x1.999999999999ap-4\n"
    assert found == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 5}, {"use_rslora": True}, {"alpha_pattern": {"layers.0.self_attn.q_proj": 5}}]
)
def test_digest_of_the_scalings_tells_what_the_weights_do_not(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    plain = scalings_of(tmp_path / "plain")
    assert scalings_of(tmp_path / "other", **changes) != plain
    assert scalings_of(tmp_path / "same", lora_dropout=0.5, alpha_pattern={"q_proj": 4}) == plain


def test_scaling_is_folded_into_expand(tmp_path: Path) -> None:
    tensors = make_tensors()
    weights = load_directory(write_adapter(tmp_path, tensors=tensors))
    assert torch.equal(weights.modules[Q_PROJ].shrink, tensors[A])
    assert torch.equal(weights.modules[Q_PROJ].expand, 2 * tensors[B].T)
    assert weights.modules[Q_PROJ].expand.is_contiguous()
    assert weights.modules[Q_PROJ].shrink_bias is None
    assert weights.modules[DOWN_PROJ].shrink.shape == (2, INNER)
    assert weights.target_modules == ("down_proj", "q_proj")
    assert (weights.max_rank, weights.is_low_rank_only) == (2, True)


def test_digest_is_that_of_the_weights_file(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path)
    expected = hashlib.sha256((directory / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert load_directory(directory).digest == expected


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16])
def test_scaled_in_float32_then_cast(stored: torch.dtype, served: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in make_pair(Q_PROJ, HIDDEN, HIDDEN).items()}
    config = make_config(lora_alpha=3, use_rslora=True)
    module = load_directory(write_adapter(tmp_path, config=config, tensors=tensors), dtype=served).modules[
        Q_PROJ
    ]
    assert (module.shrink.dtype, module.expand.dtype) == (served, served)
    assert torch.equal(module.shrink, tensors[A].to(served))
    assert torch.equal(module.expand, (tensors[B].float() * (3 / 2**0.5)).T.to(served))


def test_budget_counts_what_is_kept(tmp_path: Path) -> None:
    config = make_config(lora_bias=True)
    directory = write_adapter(tmp_path, config=config, tensors={**PAIR, BIAS: ONES})
    nbytes = load_directory(directory).nbytes
    assert load_directory(directory, budget_bytes=nbytes).nbytes == nbytes
    error = refusal_of(directory, budget_bytes=nbytes - 1)
    assert isinstance(error, CapacityError)
    assert (error.reason, error.retry_after_s) == ("ADAPTER_TOO_BIG", None)


def test_rank_rows_lie_in_pinned_memory_for_a_pool_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(lora_bias=True)
    directory = write_adapter(tmp_path, config=config, tensors={**PAIR, BIAS: ONES})
    pinned = count_pinned(monkeypatch)
    expected = load_directory(directory)
    assert not pinned
    weights = load_directory(directory, new_memory=pinned_memory, taken_bytes=pinned_bytes)
    for path, lora in weights.modules.items():
        for name in ("shrink", "expand", "shrink_bias"):
            tensor, other = getattr(lora, name), getattr(expected.modules[path], name)
            assert is_pinned(tensor, pinned)
            assert tensor is other is None or torch.equal(tensor, other)


def test_budget_counts_what_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_adapter(tmp_path)
    in_pageable = load_directory(directory).nbytes
    pinned = count_pinned(monkeypatch)
    pinning = {"new_memory": pinned_memory, "taken_bytes": pinned_bytes}
    nbytes = load_directory(directory, **pinning).nbytes
    (rows,) = pinned
    assert nbytes == in_pageable - rows.nbytes + pinned_bytes(rows.nbytes) > in_pageable
    assert load_directory(directory, budget_bytes=nbytes, **pinning).nbytes == nbytes
    assert refusal_of(directory, budget_bytes=nbytes - 1, **pinning).reason == "ADAPTER_TOO_BIG"


@pytest.mark.parametrize(("asked", "taken"), [(0, 0), (1, 1), (64, 64), (65, 128), (84 << 20, 128 << 20)])
def test_pinned_memory_comes_in_powers_of_two(asked: int, taken: int) -> None:
    assert pinned_bytes(asked) == taken


def without(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def with_value(value: float) -> dict[str, Tensor]:
    tensors = make_tensors()
    tensors[B][3, 1] = value
    return tensors


EMBEDDING_A, EMBEDDING_B = f"{PREFIX}{EMBEDDING}.lora_embedding_A", f"{PREFIX}{EMBEDDING}.lora_embedding_B"
OUT_OF_RANGE = make_pair("model.layers.2.self_attn.q_proj", HIDDEN, HIDDEN)
TO_SAVE = {"modules_to_save": [LM_HEAD]}

TWO_MAGNITUDES = {**PAIR, MAGNITUDE: ONES, f"{MAGNITUDE}.weight": ONES.clone()}
HEAD_TWICE = {**WHOLE_HEAD, **make_pair(LM_HEAD, HIDDEN, VOCAB)}
BIASED_HEAD = {**WHOLE_HEAD, f"{PREFIX}{LM_HEAD}.bias": torch.ones(VOCAB)}
NAMED_PAIR = {f"{name.removesuffix('.weight')}.default.weight": tensor for name, tensor in PAIR.items()}

REFUSED: dict[str, tuple[str, dict[str, object], Mapping[str, Tensor]]] = {
    "no_tensors": ("NO_EFFECTIVE_MODULES", {}, {}),
    "layer_out_of_range": ("NO_EFFECTIVE_MODULES", {}, OUT_OF_RANGE),
    "another_model": ("NO_EFFECTIVE_MODULES", {}, make_pair("transformer.h.0.attn.c_attn", HIDDEN, HIDDEN)),
    "one_layer_out_of_range": ("UNEXPECTED_TENSOR", {}, {**PAIR, **OUT_OF_RANGE}),
    "stranger": ("UNEXPECTED_TENSOR", {}, {**PAIR, "x": torch.ones(1)}),
    "norm": ("UNEXPECTED_TENSOR", {}, {**PAIR, f"{PREFIX}model.norm.weight": torch.ones(HIDDEN)}),
    "classifier": ("UNEXPECTED_TENSOR", {}, {**PAIR, f"{PREFIX}score.weight": torch.ones(2, HIDDEN)}),
    "base_bias": ("UNEXPECTED_TENSOR", {}, {**PAIR, f"{PREFIX}{Q_PROJ}.base_layer.bias": torch.ones(HIDDEN)}),
    "head_bias": ("UNEXPECTED_TENSOR", TO_SAVE, BIASED_HEAD),
    "no_prefix": ("NO_EFFECTIVE_MODULES", {}, {name.removeprefix(PREFIX): t for name, t in PAIR.items()}),
    "adapter_name_in_key": ("NO_EFFECTIVE_MODULES", {}, NAMED_PAIR),
    "kasa_diagonal": ("UNEXPECTED_TENSOR", {}, {**PAIR, f"{PREFIX}{Q_PROJ}.lora_diag": torch.ones(2)}),
    "embedding_as_linear": ("UNEXPECTED_TENSOR", {}, {**PAIR, **make_pair(EMBEDDING, VOCAB, HIDDEN)}),
    "no_b": ("PAIR_MISSING", {}, without(PAIR, B)),
    "no_a": ("PAIR_MISSING", {}, without(PAIR, A)),
    "no_bias": ("PAIR_MISSING", {"lora_bias": True}, PAIR),
    "no_magnitude": ("PAIR_MISSING", {"use_dora": True}, PAIR),
    "bias_not_announced": ("UNEXPECTED_TENSOR", {}, {**PAIR, BIAS: ONES}),
    "magnitude_not_announced": ("UNEXPECTED_TENSOR", {}, {**PAIR, MAGNITUDE: ONES}),
    "magnitude_twice": ("UNEXPECTED_TENSOR", {"use_dora": True}, TWO_MAGNITUDES),
    "rank_differs": ("RANK_MISMATCH", {"r": 4}, PAIR),
    "rank_differs_from_pattern": ("RANK_MISMATCH", {"rank_pattern": {"q_proj": 3}}, PAIR),
    "transposed": ("SHAPE_MISMATCH", {}, {A: torch.ones(HIDDEN, 2), B: torch.ones(2, HIDDEN)}),
    "wrong_inputs": ("SHAPE_MISMATCH", {}, make_pair(Q_PROJ, HIDDEN + 1, HIDDEN)),
    "wrong_outputs": ("SHAPE_MISMATCH", {}, make_pair(Q_PROJ, HIDDEN, HIDDEN - 1)),
    "ranks_of_a_and_b_differ": ("SHAPE_MISMATCH", {}, {**PAIR, A: torch.ones(3, HIDDEN)}),
    "one_dimension": ("SHAPE_MISMATCH", {}, {**PAIR, A: torch.ones(2 * HIDDEN)}),
    "no_dimension": ("SHAPE_MISMATCH", {}, {**PAIR, A: torch.tensor(1.0)}),
    "empty": ("SHAPE_MISMATCH", {}, {**PAIR, A: torch.ones(0, HIDDEN)}),
    "wrong_bias": ("SHAPE_MISMATCH", {"lora_bias": True}, {**PAIR, BIAS: torch.ones(3)}),
    "wrong_magnitude": ("SHAPE_MISMATCH", {"use_dora": True}, {**PAIR, MAGNITUDE: torch.ones(HIDDEN, 1)}),
    "wrong_hidden_of_head": ("SHAPE_MISMATCH", TO_SAVE, {HEAD: torch.ones(VOCAB, HIDDEN + 1)}),
    "nan": ("NOT_FINITE", {}, with_value(float("nan"))),
    "infinite": ("NOT_FINITE", {}, with_value(float("-inf"))),
    "1e38": ("NOT_FINITE", {}, with_value(1e38)),
    "nan_in_head": ("NOT_FINITE", TO_SAVE, {HEAD: torch.full((VOCAB, HIDDEN), float("nan"))}),
    "nan_in_magnitude": (
        "NOT_FINITE",
        {"use_dora": True},
        {**PAIR, MAGNITUDE: torch.full((HIDDEN,), float("nan"))},
    ),
    "overflow_by_scaling": ("NOT_FINITE", {"lora_alpha": 1e9}, PAIR),
    "resized_head": ("ADAPTER_UNSUPPORTED", TO_SAVE, {HEAD: torch.ones(VOCAB + 8, HIDDEN)}),
    "whole_projection": (
        "ADAPTER_UNSUPPORTED",
        {},
        {**PAIR, f"{PREFIX}{DOWN_PROJ}.weight": torch.ones(HIDDEN, INNER)},
    ),
    "unknown_module_to_save": ("ADAPTER_UNSUPPORTED", {"modules_to_save": ["score"]}, PAIR),
    "replaced_and_adapted": ("ADAPTER_UNSUPPORTED", TO_SAVE, HEAD_TWICE),
    "declared_but_missing": ("TENSOR_MISSING", TO_SAVE, PAIR),
    "float64": ("DTYPE_UNSUPPORTED", {}, {name: t.double() for name, t in PAIR.items()}),
    "int8": ("DTYPE_UNSUPPORTED", {}, {name: t.char() for name, t in PAIR.items()}),
}


@pytest.mark.parametrize(("reason", "changes", "tensors"), REFUSED.values(), ids=REFUSED)
def test_unfit_adapter_is_refused(
    reason: str, changes: dict[str, object], tensors: Mapping[str, Tensor], tmp_path: Path
) -> None:
    error = refusal_of(write_adapter(tmp_path, config=make_config(**changes), tensors=tensors))
    assert isinstance(error, ArtifactError)
    assert error.reason == reason


def test_refusal_names_the_tensor(tmp_path: Path) -> None:
    error = refusal_of(write_adapter(tmp_path, tensors=with_value(float("nan"))))
    assert error.metadata == {"tensor": B}
    assert B in error.message


def test_overflow_in_the_serving_dtype_is_refused(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, tensors=with_value(60_000))
    assert load_directory(directory, dtype=torch.float32).max_rank == 2
    assert refusal_of(directory, dtype=torch.float16).reason == "NOT_FINITE"  # 120,000 once scaled


def test_rank_over_the_limit_is_refused(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path)
    assert refusal_of(directory, max_rank=1).reason == "RANK_TOO_LARGE"
    assert load_directory(directory, max_rank=2).max_rank == 2


def test_row_of_a_bias_counts_as_rank(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, config=make_config(lora_bias=True), tensors={**PAIR, BIAS: ONES})
    assert refusal_of(directory, max_rank=2).reason == "RANK_TOO_LARGE"


@pytest.mark.parametrize("name", [HEAD, f"{PREFIX}{LM_HEAD}.modules_to_save.weight"])
def test_both_names_of_a_saved_module_are_known(name: str, tmp_path: Path) -> None:
    saved = torch.randn(VOCAB, HIDDEN)
    weights = load_directory(write_adapter(tmp_path, config=make_config(**TO_SAVE), tensors={name: saved}))
    assert torch.equal(weights.replacements[LM_HEAD], saved)
    assert (weights.modules, weights.max_rank, weights.is_low_rank_only) == ({}, 0, False)
    assert weights.nbytes == saved.nbytes


def test_embedding_keeps_its_layout(tmp_path: Path) -> None:
    tensors = {EMBEDDING_A: torch.randn(2, VOCAB), EMBEDDING_B: torch.randn(HIDDEN, 2)}
    module = load_directory(write_adapter(tmp_path, tensors=tensors)).modules[EMBEDDING]
    assert (module.shrink.shape, module.expand.shape) == ((2, VOCAB), (2, HIDDEN))


def test_other_base_is_refused_unless_allowed(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, config=make_config(base_model_name_or_path="org/other"))
    assert refusal_of(directory).reason == "WRONG_BASE_MODEL"
    assert load_directory(directory, allow_base_mismatch=True).max_rank == 2
    assert load_directory(directory, make_base_modules(model_name="OTHER")).max_rank == 2


@pytest.mark.parametrize("pickle", ["adapter_model.bin", "adapter_model.pt"])
def test_pickle_is_refused_unopened(pickle: str, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path)
    (directory / pickle).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert load_directory(directory).max_rank == 2
    (directory / WEIGHTS_FILE).unlink()
    assert refusal_of(directory).reason == "PICKLE_REFUSED"


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path)
    (directory / WEIGHTS_FILE).unlink()
    assert refusal_of(directory).reason == "WEIGHTS_MISSING"


@pytest.mark.timeout(10)
def test_weights_that_are_no_file_are_refused(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path)
    file = directory / WEIGHTS_FILE
    file.rename(directory / "real")
    file.symlink_to("real")
    assert refusal_of(directory).reason == "ADAPTER_PATH_ESCAPE"
    file.unlink()
    os.mkfifo(file)
    assert refusal_of(directory).reason == "NOT_A_REGULAR_FILE"


def test_names_and_sizes_are_judged_before_data_is_read(tmp_path: Path) -> None:
    """A file of a terabyte, nearly all of it a hole, is refused from its header."""
    directory = write_adapter(tmp_path)
    num_bytes = 1 << 40
    header = {A: {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}}
    data = encode_safetensors(header)
    (directory / WEIGHTS_FILE).write_bytes(data)
    os.truncate(directory / WEIGHTS_FILE, len(data) + num_bytes)
    assert refusal_of(directory).reason == "PAIR_MISSING"


def test_evil_pattern_is_refused_in_bounded_time(tmp_path: Path) -> None:
    evil = {f"((((.*)*)*)*)*x{number}": 1 for number in range(1000)}
    directory = write_adapter(tmp_path, config=make_config(rank_pattern=evil))
    started = time.perf_counter()
    load_or_refuse(directory)
    assert time.perf_counter() - started < 10


def load_or_refuse(directory: Path) -> None:
    try:
        assert load_directory(directory).max_rank == 2
    except ArtifactError as error:
        assert error.reason == "ADAPTER_UNSUPPORTED"


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, tensors=with_value(float("nan")))
    before = len(os.listdir("/proc/self/fd"))
    refusal_of(directory)
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_of_another_adapter_leaves_no_trace(tmp_path: Path) -> None:
    """Whatever was there before is overwritten, between its parts, too, as far as anybody reads."""
    config = make_config(lora_bias=True)
    directory = write_adapter(tmp_path, config=config, tensors={**PAIR, BIAS: ONES})
    expected = load_directory(directory)
    weights = load_directory(directory, new_memory=lambda num_bytes: torch.full((num_bytes,), 0xFF).byte())
    for path, module in expected.modules.items():
        for name in ("shrink", "expand", "shrink_bias"):
            found, wanted = getattr(weights.modules[path], name), getattr(module, name)
            assert found is wanted is None or torch.equal(found, wanted)
