"""The floor of a workload against sums done by hand."""

import pytest

from fusionserve.loadtest.bench.floor import Load, MachineLimit, ModelSize, floor
from fusionserve.loadtest.bench.protocol import BASE, FUSION, MIXED
from fusionserve.loadtest.bench.workloads import WORKLOADS, model_size

# One layer: q and o 4x4, k and v 4x2, gate, up and down 4x8; the head is 10x4.
SIZE = ModelSize(hidden=4, inner=8, num_layers=1, query_width=4, kv_width=2, vocab_size=10)
LINEAR, HEAD, KV_BYTES = 2 * 16 + 2 * 8 + 3 * 32, 40, 8
LOAD = Load(num_streams=2, prompt_tokens=3, new_tokens=3)


def test_sizes_are_counted_matrix_by_matrix() -> None:
    assert (SIZE.linear_params, SIZE.head_params, SIZE.kv_bytes_per_token) == (LINEAR, HEAD, KV_BYTES)
    assert SIZE.adapter_params(2) == 2 * (2 * 8 + 2 * 6 + 3 * 12)
    assert SIZE.fusion_params(3, 2) == 3 * (128 + 3 * 4)


def test_reading_bounds_a_machine_that_multiplies_at_once() -> None:
    least = floor(SIZE, LOAD, MachineLimit(bytes_per_s=1.0, flops_per_s=1e18))
    weights = 2 * (LINEAR + HEAD)
    assert least.prompt_s == weights
    assert least.decode_s == 2 * weights + 2 * (4 + 5) * KV_BYTES
    assert least.total_s == least.prompt_s + least.decode_s


def test_multiplying_bounds_a_machine_that_reads_at_once() -> None:
    least = floor(SIZE, LOAD, MachineLimit(bytes_per_s=1e18, flops_per_s=1.0))
    attention = 4 * 4  # per token of context: scores and sums over four numbers of query
    assert least.prompt_s == 2 * (3 * 2 * LINEAR + attention * (1 + 2 + 3) + 2 * HEAD)
    assert least.decode_s == 2 * (2 * 2 * (LINEAR + HEAD) + attention * (4 + 5))


def test_adapters_count_per_token_and_once_per_step_each() -> None:
    adapted = Load(
        num_streams=2, prompt_tokens=3, new_tokens=3, adapter_params_per_token=5, adapter_params_read=10
    )
    reads, multiplies = MachineLimit(1.0, 1e18), MachineLimit(1e18, 1.0)
    assert floor(SIZE, adapted, reads).total_s - floor(SIZE, LOAD, reads).total_s == 3 * 2 * 10
    assert floor(SIZE, adapted, multiplies).total_s - floor(SIZE, LOAD, multiplies).total_s == 2 * 2 * 5 * 5


def test_real_shapes_have_their_known_sizes() -> None:
    smollm, qwen = model_size("smollm2-135m"), model_size("qwen2.5-0.5b")
    assert smollm.linear_params + smollm.head_params == pytest.approx(134.5e6, rel=0.001)
    assert qwen.linear_params + qwen.head_params == pytest.approx(494e6, rel=0.001)
    assert smollm.adapter_params(16) == pytest.approx(4.88e6, rel=0.01)


def test_a_mixed_round_reads_each_adapter_in_use_once() -> None:
    one = model_size("smollm2-135m").adapter_params(16)
    assert WORKLOADS["W1"].load(BASE).adapter_params_read == 0
    assert WORKLOADS["W1"].load(MIXED).adapter_params_read == 8 * one
    assert WORKLOADS["W4"].load(MIXED).adapter_params_read == one
    assert WORKLOADS["W1"].load(FUSION).adapter_params_per_token > 4 * one
