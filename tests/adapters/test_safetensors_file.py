"""The reader against files that lie, and against the safetensors library on files that do not."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import encode_safetensors
from safetensors import SafetensorError
from safetensors.torch import load, save

from fusionserve.adapters.safetensors_file import MAX_HEADER_BYTES, MAX_TENSORS, SafetensorsFile
from fusionserve.errors import ArtifactError

EIGHT = b"\0" * 8


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    with io.FileIO(path) as opened:
        file = SafetensorsFile(opened)
        tensors = {spec.name: tensor for spec, tensor in file.read_tensors()}
        return tensors, file.digest()


def reason_of(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as refusal:
        read(path)
    assert str(path) not in refusal.value.message
    return refusal.value.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_the_library_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).to(dtype),
        "a": torch.randn(7).to(dtype),
        "empty": torch.empty(0, 4).to(dtype),
    }
    data = save(tensors, metadata={"format": "pt"})
    (tmp_path / "x").write_bytes(data)
    ours, digest = read(tmp_path / "x")
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[name], tensors[name]) and ours[name].dtype == dtype for name in tensors)
    assert digest == hashlib.sha256(data).hexdigest()


def test_reads_tensors_of_any_size_and_dtype_in_any_order(tmp_path: Path) -> None:
    """They are read in blocks: small ones together, a large one alone, and each where its dtype may lie."""
    names = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
    header: dict[str, object] = {}
    tensors, data = {}, b""
    for i, size in enumerate([3, 5, 7, 900_001, 1, 300_000, 300_000, 300_000, 0, 9]):
        for name, dtype in list(names.items()) * 2:
            key, tensor = f"{i} {len(tensors)}", torch.randn(size).to(dtype)
            end = len(data) + tensor.nbytes
            header[key] = entry(name, [size], [len(data), end])
            data += tensor.view(torch.uint8).numpy().tobytes()
            tensors[key] = tensor
    encoded = encode_safetensors(header, data)
    (tmp_path / "x").write_bytes(encoded)
    ours, digest = read(tmp_path / "x")
    assert all(torch.equal(ours[key], tensor) for key, tensor in tensors.items())
    assert digest == hashlib.sha256(encoded).hexdigest()


def test_tensors_are_private_and_writable(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(save({"a": torch.zeros(4)}))
    tensors, _ = read(path)
    tensors["a"].add_(1)
    assert torch.equal(read(path)[0]["a"], torch.zeros(4))


@pytest.mark.parametrize("length", [0, 7, 8, 9])
def test_short_file_is_truncated(length: int, tmp_path: Path) -> None:
    assert reason_of(tmp_path / "x", save({"a": torch.zeros(4)})[:length]) == "WEIGHTS_TRUNCATED"


def test_missing_data_is_truncated(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "x", save({"a": torch.zeros(4)})[:-1]) == "WEIGHTS_TRUNCATED"


def test_file_that_shrinks_while_it_is_read_is_truncated(tmp_path: Path) -> None:
    """A mapped file would end the process here."""
    path = tmp_path / "x"
    path.write_bytes(save({"a": torch.zeros(1 << 16)}))
    with io.FileIO(path) as opened:
        file = SafetensorsFile(opened)
        with path.open("r+b") as other:
            other.truncate(4096)
        with pytest.raises(ArtifactError) as refusal:
            list(file.read_tensors())
    assert refusal.value.reason == "WEIGHTS_TRUNCATED"


HEADERS_TOO_LARGE = {
    "all_bits": encode_safetensors({}, header_bytes=2**64 - 1),
    "past_limit": encode_safetensors({}, header_bytes=MAX_HEADER_BYTES + 1),
    "blanks": encode_safetensors(b"{}" + b" " * MAX_HEADER_BYTES),
    "many_tensors": encode_safetensors(
        {str(i): entry(shape=[0], offsets=[0, 0]) for i in range(MAX_TENSORS + 1)}
    ),
    "100_000_tensors": encode_safetensors(
        {f"t{i}": entry(shape=[0], offsets=[0, 0]) for i in range(100_000)}
    ),
}


@pytest.mark.parametrize("data", HEADERS_TOO_LARGE.values(), ids=HEADERS_TOO_LARGE)
def test_large_header_is_refused(data: bytes, tmp_path: Path) -> None:
    assert reason_of(tmp_path / "x", data) == "HEADER_TOO_LARGE"


MALFORMED = {
    "not_json": encode_safetensors(b"{oops}"),
    "not_utf8": encode_safetensors(b'{"\xff": 1}'),
    "list": encode_safetensors([]),
    "leading_blank": encode_safetensors(b" {}"),
    "trailing_bytes": encode_safetensors({"a": entry()}, EIGHT + b"x"),
    "no_tensor_but_bytes": encode_safetensors({}, EIGHT),
    "hole": encode_safetensors({"a": entry(offsets=(4, 12))}, EIGHT + EIGHT),
    "overlap": encode_safetensors({"a": entry(), "b": entry(offsets=(4, 12))}, EIGHT + EIGHT),
    "same_place": encode_safetensors({"a": entry(), "b": entry()}, EIGHT),
    "reversed": encode_safetensors({"a": entry(offsets=(8, 0))}, EIGHT),
    "negative": encode_safetensors({"a": entry(offsets=(-8, 0))}, EIGHT),
    "huge_offset": encode_safetensors({"a": entry(offsets=(2**63, 2**63 + 8))}, EIGHT),
    "shape_and_bytes_differ": encode_safetensors({"a": entry(shape=(3,))}, EIGHT),
    "overflowing_shape": encode_safetensors({"a": entry(shape=(2**32, 2**32))}, EIGHT),
    "empty_but_huge": encode_safetensors({"a": entry(shape=(0, 10**4000), offsets=(0, 0))}),
    "negative_shape": encode_safetensors({"a": entry(shape=(-2,))}, EIGHT),
    "float_shape": encode_safetensors({"a": entry(shape=(2.0,))}, EIGHT),
    "true_shape": encode_safetensors({"a": entry(shape=(True, 2))}, EIGHT),
    "text_shape": encode_safetensors({"a": entry(shape="2")}, EIGHT),
    "1000_dimensions": encode_safetensors({"a": entry(shape=[1] * 999 + [2])}, EIGHT),
    "three_offsets": encode_safetensors({"a": entry(offsets=(0, 8, 8))}, EIGHT),
    "extra_key": encode_safetensors({"a": {**entry(), "x": 1}}, EIGHT),
    "no_dtype": encode_safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "entry_is_a_number": encode_safetensors({"a": 1}, EIGHT),
    "metadata_of_numbers": encode_safetensors({"__metadata__": {"a": 1}, "a": entry()}, EIGHT),
    "metadata_is_a_list": encode_safetensors({"__metadata__": [], "a": entry()}, EIGHT),
    "same_name_twice": encode_safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        EIGHT,
    ),
    "deep": encode_safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nan": encode_safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', EIGHT),
    "git_lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_file_is_refused(data: bytes, tmp_path: Path) -> None:
    assert reason_of(tmp_path / "x", data) == "WEIGHTS_MALFORMED"


@pytest.mark.parametrize("dtype", ["F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "nonsense", 3])
def test_other_dtype_is_refused(dtype: str, tmp_path: Path) -> None:
    assert reason_of(tmp_path / "x", encode_safetensors({"a": entry(dtype)}, EIGHT)) == "DTYPE_UNSUPPORTED"


def test_hostile_name_is_quoted_and_cut(tmp_path: Path) -> None:
    name = "../\x00\x1b[31m\u202e" + "x" * 100_000
    (tmp_path / "x").write_bytes(encode_safetensors({name: entry(shape=(3,))}, EIGHT))
    with pytest.raises(ArtifactError) as refusal:
        read(tmp_path / "x")
    for text in (refusal.value.message, refusal.value.metadata["tensor"]):
        assert text.isascii() and text.isprintable() and len(text) < 300


GOOD = save({"a": torch.arange(4.0), "b": torch.ones(2, 3)}, metadata={"format": "pt"})


@settings(max_examples=150, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_read_as_the_library_does(
    edits: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(GOOD)
    for index, value in edits:
        data[index] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(data)
    try:
        ours, _ = read(path)
    except ArtifactError:
        return
    try:
        theirs = load(bytes(data))
    except SafetensorError as error:
        raise AssertionError("accepted what the library refuses") from error
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in ours)


def test_header_of_a_large_adapter_fits() -> None:
    """126 layers, seven projections, DoRA: the largest that is known."""
    names = [
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector{part}"
        for layer in range(126)
        for part in range(21)
    ]
    header = {name: entry(shape=[16, 16384], offsets=[10**9, 10**9 + 8]) for name in names}
    assert len(names) <= MAX_TENSORS
    assert len(json.dumps(header)) <= MAX_HEADER_BYTES
