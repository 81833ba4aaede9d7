"""A safetensors reader for files from strangers.

The header is read and checked first, so that a caller can refuse names, shapes and dtypes before any data is
read. Data is read into private memory, never mapped: a mapped file that somebody shortens would kill the
process. The rules are those of the format (no hole, no overlap, no trailing bytes) and stricter: each name
once, few tensors, small header.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from fusionserve.adapters.artifact_errors import bad_tensor
from fusionserve.adapters.strict_json import StrictJsonError, parse_json_object
from fusionserve.errors import ArtifactError, UnavailableError
from fusionserve.failpoints import reach_failpoint

# A LoRA of all seven projections of a 126-layer model with DoRA has 2,646 tensors and 0.4 MB of header.
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 8192
MAX_DIMENSIONS = 8
MAX_SIZE = (1 << 63) - 1

DTYPES = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})

_LENGTH_BYTES = 8
_BLOCK_BYTES = 1 << 20  # what is read at once of small tensors; a second cache holds it while it is copied
_GIT_LFS_POINTER = b"version "  # what a clone without Git LFS leaves in place of a large file
_HEADER_DEPTH = 3  # file, entry, shape
_NO_BYTES = torch.empty(0, dtype=torch.uint8)  # frombuffer refuses an empty buffer
_KEPT_HEADERS = 4  # fine-tunes of one base by one script have the same, and parsing it is a tenth of a load


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What the header says of one tensor; `start` and `end` count from the first byte of data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class WeightsHeader:
    """What a header says, checked: tensors by name, in the order of their data, and the bytes of all that data.

    `blocks` are what is read at once: neighbours of one dtype, a megabyte or a single larger one.
    Files of the same header share one, as long as it is kept, so it may key what follows from it.
    """

    tensors: Mapping[str, TensorSpec]
    num_bytes: int
    blocks: Sequence[Sequence[TensorSpec]]


class SafetensorsFile:
    """An open file whose header is checked.

    Raises ArtifactError when made: WEIGHTS_TRUNCATED, WEIGHTS_MALFORMED, HEADER_TOO_LARGE, DTYPE_UNSUPPORTED.
    Any read raises UnavailableError if the storage fails. The caller keeps `file` and closes it.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.header = self._read_header(os.fstat(file.fileno()).st_size)
        self._is_hashed = False
        reach_failpoint("artifact.header")

    def read_blocks(self) -> Iterator[Tensor]:
        """Yields the bytes of each of the header's blocks, in private memory.

        A thread hashes what was read meanwhile, so write to none before the digest is known.
        Raises ArtifactError WEIGHTS_TRUNCATED if the file got shorter since it was opened.
        """
        with ThreadPoolExecutor(1, "safetensors-hash") as thread:
            hashed: Future[None] | None = None
            for block in self.header.blocks:
                data = self._read_exactly(block[-1].end - block[0].start)
                if hashed is not None:
                    hashed.result()  # so that no more than two blocks are held
                hashed = thread.submit(self._hash.update, data)
                yield torch.frombuffer(data, dtype=torch.uint8) if data else _NO_BYTES
        self._is_hashed = True

    def read_tensors(self) -> Iterator[tuple[TensorSpec, Tensor]]:
        """Yields every tensor once, in file order; those of a block share its memory."""
        for block, data in zip(self.header.blocks, self.read_blocks(), strict=True):
            for spec in block:
                yield spec, tensor_in(data, spec, block[0].start)

    def digest(self) -> str:
        """The sha256 (hex) of the whole file, of the very bytes that were read. Needs all blocks read."""
        assert self._is_hashed, "the digest needs the whole file"
        return self._hash.hexdigest()

    def _read_header(self, file_bytes: int) -> WeightsHeader:
        if file_bytes < _LENGTH_BYTES:
            raise _truncated()
        prefix = self._read_hashed(_LENGTH_BYTES)
        if prefix == _GIT_LFS_POINTER:
            raise _malformed("it is a Git LFS pointer, not the file itself")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ArtifactError(
                f"the weights file's header is over {MAX_HEADER_BYTES} bytes", reason="HEADER_TOO_LARGE"
            )
        if _LENGTH_BYTES + header_bytes > file_bytes:
            raise _truncated()
        header = _parse_header(self._read_hashed(header_bytes))
        data_bytes = file_bytes - _LENGTH_BYTES - header_bytes
        if header.num_bytes > data_bytes:
            raise _truncated()
        if header.num_bytes < data_bytes:
            raise _malformed("it has bytes that belong to no tensor")
        return header

    def _read_hashed(self, num_bytes: int) -> bytes:
        data = bytes(self._read_exactly(num_bytes))
        self._hash.update(data)
        return data

    def _read_exactly(self, num_bytes: int) -> bytearray:
        buffer = bytearray(num_bytes)
        view = memoryview(buffer)
        done = 0
        while done < num_bytes:
            try:
                count = self._file.readinto(view[done:])
            except OSError:
                raise UnavailableError(
                    "the weights could not be read from storage", reason="STORAGE_UNAVAILABLE"
                ) from None
            if not count:
                raise _truncated()
            done += count
        return buffer


def read_ahead(file: io.FileIO) -> None:
    """Asks the system to begin reading all of it, as much as it thinks fit, while the header is parsed."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # a file system without
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


@lru_cache(_KEPT_HEADERS)
def _parse_header(data: bytes) -> WeightsHeader:
    if not data.startswith(b"{"):
        raise _malformed("its header is not a JSON object")
    try:
        header = parse_json_object(data, max_depth=_HEADER_DEPTH)
    except StrictJsonError as error:
        raise _malformed(f"its header is wrong: {error}") from None
    _check_metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise ArtifactError(f"the weights file has over {MAX_TENSORS} tensors", reason="HEADER_TOO_LARGE")
    specs = [_parse_entry(name, entry) for name, entry in header.items()]
    specs.sort(key=lambda spec: (spec.start, spec.end))
    num_bytes = _check_layout(specs)
    return WeightsHeader(
        MappingProxyType({spec.name: spec for spec in specs}), num_bytes, tuple(_blocks(specs))
    )


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed("its metadata is not a map of strings")


def _parse_entry(name: str, entry: object) -> TensorSpec:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad_tensor("WEIGHTS_MALFORMED", name, "its header entry is wrong")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise bad_tensor("DTYPE_UNSUPPORTED", name, f"its dtype is not one of {', '.join(DTYPES)}")
    shape, offsets = _to_sizes(entry["shape"]), _to_sizes(entry["data_offsets"])
    if shape is None or len(shape) > MAX_DIMENSIONS or offsets is None or len(offsets) != 2:
        raise bad_tensor("WEIGHTS_MALFORMED", name, "its shape or offsets are wrong")
    spec = TensorSpec(name=name, dtype=DTYPES[entry["dtype"]], shape=shape, start=offsets[0], end=offsets[1])
    if spec.end - spec.start != math.prod(shape) * spec.dtype.itemsize:
        raise bad_tensor("WEIGHTS_MALFORMED", name, "its shape and its number of bytes differ")
    return spec


def _to_sizes(value: object) -> tuple[int, ...] | None:
    """A list of integers from 0 to MAX_SIZE (a JSON true is none), or None."""
    if not isinstance(value, list):
        return None
    for item in value:
        if type(item) is not int or not 0 <= item <= MAX_SIZE:
            return None
    return tuple(value)


def _check_layout(specs: Sequence[TensorSpec]) -> int:
    """Raises unless the data of each begins where that of the one before ends; returns where the last one ends."""
    position = 0
    for spec in specs:
        if spec.start != position:
            raise bad_tensor("WEIGHTS_MALFORMED", spec.name, "its data overlaps another's or leaves a hole")
        position = spec.end
    return position


def _blocks(specs: Iterable[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Of one dtype, so that each tensor is aligned."""
    block: list[TensorSpec] = []
    for spec in specs:
        if block and (spec.dtype != block[0].dtype or spec.end - block[0].start > _BLOCK_BYTES):
            yield block
            block = []
        block.append(spec)
    if block:
        yield block


def tensor_in(block: Tensor, spec: TensorSpec, start: int) -> Tensor:
    """The tensor of a block whose bytes begin at `start` of the data."""
    return block[spec.start - start : spec.end - start].view(spec.dtype).view(spec.shape)


def _truncated() -> ArtifactError:
    return ArtifactError("the weights file is cut short", reason="WEIGHTS_TRUNCATED")


def _malformed(problem: str) -> ArtifactError:
    return ArtifactError(f"the weights file cannot be read: {problem}", reason="WEIGHTS_MALFORMED")
