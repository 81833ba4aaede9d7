"""The adapted layers against the equation, and that one token's adapter never touches another's output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from loose_adapters import (
    D_IN,
    D_OUT,
    EMBEDDING,
    FIRST,
    VOCAB,
    make_adapter,
    make_content,
    make_lora,
    make_modules,
)
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fusionserve.adapters.adapted_embedding import AdaptedEmbedding
from fusionserve.adapters.adapted_linear import AdaptedLinear
from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.lora_weights import ModuleLoRA
from fusionserve.adapters.pool import AdapterPool
from fusionserve.adapters.pool_ledger import WriteRows
from fusionserve.adapters.row_plan import (
    AdaptedTokens,
    PlanCell,
    RowPlan,
    RowRange,
    WholeModuleTokens,
    plan_segments,
    plan_spans,
)

Request = tuple[int, tuple[tuple[Adapter, float], ...]]  # tokens, and adapters with coefficients


class Bench:
    """One adapted layer over a pool, and plans for it."""

    def __init__(
        self, path: str, base: nn.Module, adapters: Sequence[Adapter], *, as_segments: bool = False
    ) -> None:
        self.cell = PlanCell()
        self._as_segments = as_segments
        self.base = base
        pool = AdapterPool(make_modules(), 32, dtype=torch.float32, device=torch.device("cpu"))
        self.starts: dict[Adapter, int] = {}
        start = 0
        for adapter in adapters:
            pool.apply((WriteRows(adapter, start),))
            self.starts[adapter] = start
            start += adapter.num_rows
        kind = AdaptedEmbedding if path == EMBEDDING else AdaptedLinear
        self.layer = kind(base, path, pool.rows(path), self.cell)

    @torch.inference_mode()
    def run(self, x: Tensor, requests: Sequence[Request]) -> Tensor:
        """The layer's output for requests packed one after the other, as the model calls it."""
        adapted, whole, start = [], [], 0
        for num_tokens, members in requests:
            end = start + num_tokens
            rows = tuple(
                RowRange(self.starts[a], self.starts[a] + a.num_rows, c) for a, c in members if a.num_rows
            )
            adapted += [AdaptedTokens(start, end, rows)] if rows else []
            whole += [WholeModuleTokens(start, end, a) for a, _ in members if not a.weights.is_low_rank_only]
            start = end
        if self._as_segments:
            self.cell.plan = RowPlan(
                start, segments=plan_segments(adapted, [], torch.zeros(0)), whole_modules=tuple(whole)
            )
        else:
            spans = plan_spans(adapted, dtype=torch.float32, device=torch.device("cpu"))
            self.cell.plan = RowPlan(start, spans, whole_modules=tuple(whole))
        return self.layer(x[None])[0]


def make_linear(kind: str = "linear") -> nn.Module:
    torch.manual_seed(0)
    base = Conv1D(D_OUT, D_IN) if kind == "conv1d" else nn.Linear(D_IN, D_OUT)
    nn.init.normal_(base.bias)
    return base.requires_grad_(requires_grad=False)


def make_plain(rank: int, seed: int, *, bias: bool = False) -> Adapter:
    return make_adapter(make_content({FIRST: make_lora(rank, seed=seed, bias=bias)}))


def delta(lora: ModuleLoRA, x: Tensor) -> Tensor:
    bias = torch.zeros(lora.rank) if lora.shrink_bias is None else lora.shrink_bias
    return (x @ lora.shrink.T + bias) @ lora.expand


def make_x(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, D_IN, generator=torch.Generator().manual_seed(3))


as_both = pytest.mark.parametrize("as_segments", [False, True], ids=["as spans", "as segments"])


@as_both
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_mixed_batch_equals_the_equation(kind: str, as_segments: bool) -> None:
    a, b, c = make_plain(3, 1), make_plain(5, 2, bias=True), make_plain(1, 3)
    requests: list[Request] = [
        (2, ()),
        (1, ((a, 1.0),)),
        (4, ((b, -0.5),)),
        (1, ((a, 0.25), (c, 2.0))),
        (3, ((c, 1.0), (b, 0.5), (a, -1.0))),
        (1, ()),
    ]
    x, base = make_x(12), make_linear(kind)
    y = Bench(FIRST, base, [a, b, c], as_segments=as_segments).run(x, requests)
    expected, start = base(x), 0
    for num_tokens, members in requests:
        here = slice(start, start + num_tokens)
        for adapter, coefficient in members:
            expected[here] += coefficient * delta(adapter.weights.modules[FIRST], x[here])
        start += num_tokens
    torch.testing.assert_close(y, expected)


@as_both
def test_base_tokens_are_untouched_bit_for_bit(as_segments: bool) -> None:
    a, b = make_plain(8, 1), make_plain(8, 2)
    x, base = make_x(9), make_linear()
    requests: list[Request] = [
        (1, ()),
        (1, ((a, 1.0),)),
        (2, ()),
        (1, ((b, 1.0),)),
        (3, ()),
        (1, ((a, 2.0),)),
    ]
    y = Bench(FIRST, base, [a, b], as_segments=as_segments).run(x, requests)
    is_base = torch.tensor([True, False, True, True, False, True, True, True, False])
    assert torch.equal(y[is_base], base(x)[is_base])
    assert (y[~is_base] != base(x)[~is_base]).any(dim=1).all()


@as_both
@pytest.mark.parametrize("size", [float("inf"), float("-inf"), float("nan"), 1e38])
def test_overflow_of_one_adapter_stays_with_its_tokens(size: float, as_segments: bool) -> None:
    """As spans its neighbours share the product, but not the infinities."""
    good = make_plain(4, 1)
    bad = make_adapter(
        make_content({FIRST: replace(make_lora(4, seed=2), shrink=torch.full((4, D_IN), size))})
    )
    x, base = make_x(6), make_linear()
    requests: list[Request] = [(1, ((good, 1.0),)), (1, ()), (1, ((bad, 1.0),)), (1, ()), (2, ((good, 0.5),))]
    bench = Bench(FIRST, base, [good, bad], as_segments=as_segments)
    y = bench.run(x, requests)
    assert as_segments or len(bench.cell.plan.spans) == 1
    harmless = [(n, tuple(m for m in members if m[0] is good)) for n, members in requests]
    expected = Bench(FIRST, base, [good], as_segments=as_segments).run(x, harmless)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[others], expected[others])
    assert torch.equal(y[[1, 3]], base(x)[[1, 3]])
    assert not torch.allclose(y[2], base(x)[2], equal_nan=False)


def test_batch_without_adapters_is_the_base() -> None:
    bench = Bench(FIRST, make_linear(), [make_plain(2, 1)])
    x = make_x(4)
    assert torch.equal(bench.run(x, [(4, ())]), bench.base(x))
    bench.cell.plan = RowPlan(num_tokens=0)
    assert torch.equal(bench.layer(x), bench.base(x))


def test_module_that_no_adapter_touches_is_the_base() -> None:
    elsewhere = make_adapter(make_content({"layers.1.proj": make_lora(2, seed=1)}))
    bench = Bench(FIRST, make_linear(), [elsewhere])
    assert torch.equal(bench.run(make_x(4), [(4, ((elsewhere, 1.0),))]), bench.base(make_x(4)))


@as_both
@pytest.mark.parametrize("has_bias", [True, False])
def test_column_scales_apply_to_their_tokens_without_the_bias(has_bias: bool, as_segments: bool) -> None:
    scales = torch.rand(D_OUT) + 0.5
    lora = replace(make_lora(3, seed=1), magnitude=torch.ones(D_OUT))
    dora = make_adapter(make_content({FIRST: lora}, column_scales={FIRST: scales}))
    plain, base, x = make_plain(2, 5), make_linear(), make_x(7)
    if not has_bias:
        base.bias = None
    requests: list[Request] = [(2, ()), (3, ((dora, 1.0),)), (2, ((plain, 1.0),))]
    y = Bench(FIRST, base, [dora, plain], as_segments=as_segments).run(x, requests)
    expected = base(x)
    expected[2:5] = scales * (x[2:5] @ base.weight.T + delta(lora, x[2:5])) + (base.bias if has_bias else 0)
    expected[5:] += delta(plain.weights.modules[FIRST], x[5:])
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[:2], base(x)[:2])


def test_saved_weight_replaces_the_base_for_its_tokens() -> None:
    saved = torch.randn(D_OUT, D_IN)
    adapter = make_adapter(make_content(replacements={FIRST: saved}))
    base, x = make_linear(), make_x(5)
    y = Bench(FIRST, base, [adapter]).run(x, [(1, ()), (2, ((adapter, 1.0),)), (2, ())])
    assert torch.equal(y[[0, 3, 4]], base(x)[[0, 3, 4]])
    torch.testing.assert_close(y[1:3], functional.linear(x[1:3], saved, base.bias))


def test_wrong_number_of_tokens_is_a_bug() -> None:
    adapter = make_plain(2, 1)
    bench = Bench(FIRST, make_linear(), [adapter])
    with pytest.raises(AssertionError, match="tokens"):
        bench.run(make_x(5), [(4, ((adapter, 1.0),))])


@as_both
@pytest.mark.parametrize("embed_scale", [None, 4.0])
def test_embedding_adds_columns_of_a(embed_scale: float | None, as_segments: bool) -> None:
    """The scale that some models multiply embeddings with multiplies the change and the saved weight too."""
    base = nn.Embedding(VOCAB, D_IN).requires_grad_(requires_grad=False)
    factor = 1.0
    if embed_scale is not None:
        base = ScaledEmbedding(base.weight, embed_scale)
        factor = embed_scale
    lora = make_lora(3, seed=1, d_in=VOCAB, d_out=D_IN)
    saved = torch.randn(VOCAB, D_IN)
    adapter = make_adapter(make_content({EMBEDDING: lora}))
    replaced = make_adapter(make_content(replacements={EMBEDDING: saved}))
    ids = torch.tensor([0, 10, 3, 3, 7, 1])
    bench = Bench(EMBEDDING, base, [adapter, replaced], as_segments=as_segments)
    y = bench.run(ids, [(1, ()), (2, ((adapter, -0.5),)), (2, ((replaced, 1.0),)), (1, ())])
    expected = base(ids)
    expected[1:3] += -0.5 * factor * (lora.shrink.T[ids[1:3]] @ lora.expand)
    expected[3:5] = saved[ids[3:5]] * factor
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[[0, 5]], base(ids)[[0, 5]])


class ScaledEmbedding(nn.Embedding):
    """As in Gemma 3."""

    def __init__(self, weight: Tensor, embed_scale: float) -> None:
        super().__init__(*weight.shape, _weight=weight)
        self.embed_scale = nn.Buffer(torch.tensor(embed_scale), persistent=False)
        self.requires_grad_(requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return super().forward(token_ids) * self.embed_scale


def test_weight_and_bias_are_the_bases() -> None:
    bench = Bench(FIRST, make_linear(), [])
    assert bench.layer.weight is bench.base.weight
    assert bench.layer.bias is bench.base.bias
