"""How attention of decoding requests is shared out among threads: by what they read, and with the same bits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from paged_sequences import make_sequences

from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_library import native_library
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.paged_batch import PagedBatch

NUM_HEADS, NUM_KV_HEADS, DIM, BLOCK_SIZE = 16, 8, 64, 16
CPU = torch.device("cpu")
W1 = [128 + 4 * request for request in range(16)]  # 16 streams of 128 to 192 tokens

pytestmark = pytest.mark.skipif(native_library() is None, reason="there is no native library")


@pytest.fixture
def library() -> Iterator[ctypes.CDLL]:
    library = native_library()
    assert library is not None
    yield library
    library.set_num_threads(torch.get_num_threads())


def decoding(lengths: list[int]) -> PagedBatch:
    """A batch with one new token of each request, which makes it so long."""
    return PagedBatch(make_sequences(tuple((n - 1, 1) for n in lengths), BLOCK_SIZE), BLOCK_SIZE, CPU)


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        ([16000] + [64] * 31, 0),
        ([64] * 20 + [16000] + [64] * 11, 0),
        ([64] * 24 + [2000] * 8 + [64] * 32, 0),
        ([8000], 0),
        ([100, 3000, 50, 3000], 0),
        ([16000] + [64] * 31, 512),
        (W1, 0),
        ([1] * 5, 0),
    ],
    ids=["long", "long amid", "eight neighbours", "alone", "few", "window", "W1", "shortest"],
)
def test_no_piece_is_much_longer_than_a_thread_s_share(
    lengths: list[int], window: int, num_threads: int, library: ctypes.CDLL
) -> None:
    library.set_num_threads(num_threads)
    batch = decoding(lengths)
    (attention,) = batch.native_attentions()
    attention.num_kv_heads, attention.window = NUM_KV_HEADS, window
    library.longest_attention_piece.restype = ctypes.c_int64
    longest = library.longest_attention_piece(ctypes.byref(attention))
    positions = [min(n, window or n) for n in lengths]
    assert longest <= max(*positions, 2 * sum(positions) * NUM_KV_HEADS / (4 * num_threads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_bits_do_not_follow_the_number_of_threads(
    dtype: torch.dtype, window: int | None, library: ctypes.CDLL
) -> None:
    """The longest request goes by its key-value heads with some numbers of threads, and whole with others."""
    torch.manual_seed(0)
    batch = decoding([64, 30, 900, *[64] * 9])
    like, sizes = torch.empty(0, dtype=dtype), (NUM_KV_HEADS, DIM, DIM)
    num_slots = BLOCK_SIZE * 120
    cache = LayerCache.zeros(like, num_slots, BLOCK_SIZE, sizes, HugePages())
    keys, values = (torch.randn(num_slots, NUM_KV_HEADS, DIM).to(dtype) for _ in range(2))
    cache.store_(torch.arange(num_slots), keys, values)
    query = torch.randn(12, NUM_HEADS, DIM).to(dtype)
    outputs = []
    for num_threads in (1, 2, 3, 8):
        library.set_num_threads(num_threads)
        outputs.append(batch.attend(query, cache, AttentionOptions(DIM**-0.5, window)))
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])
