"""The folded rows give what the unfolded definition gives, for every option of a fusion.

In float64 with torch's operations, to 1e-10; in float32 with the native kernel that serves few tokens, to its rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from pinned_memory import count_pinned, is_pinned
from random_fusions import HIDDEN, make_base, make_config, make_member, make_trained, random_tokens
from torch import Tensor, nn

from fusionserve.adapters.adapted_linear import AdaptedLinear, Projections
from fusionserve.adapters.base_modules import BaseModule, BaseModules, ModuleKind
from fusionserve.adapters.fused_tokens import FusedSegment, FusedTokens
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.adapters.pinned_memory import pinned_bytes
from fusionserve.adapters.pool import AdapterPool
from fusionserve.adapters.row_plan import PlanCell, RowPlan, plan_segments
from fusionserve.errors import ArtifactError, CapacityError
from fusionserve.fusion import loader
from fusionserve.fusion.config import FusionConfig, Scope, ValueKind
from fusionserve.fusion.folded import FoldedFusion, count_bytes, fold_fusion, plan_rows
from fusionserve.fusion.loader import FusionPolicy, ReadFusion, fold_over, in_call_order
from fusionserve.fusion.params import FusionParams, layer_of
from fusionserve.kernels.rank_panels import Packing

NUM_TOKENS = 6
TOLERANCE = 1e-10
TOLERANCE_FLOAT32 = 1e-4
MEMBER_RANKS = ((3, 2, 3, 2), (1, 4, 2, 4), (2, 2, 5, 1), (4, 1, 1, 3))


def definition(
    config: FusionConfig,
    params: FusionParams,
    members: Sequence[LoRAWeights],
    inputs: dict[str, Tensor],
    excluded: Sequence[int] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Deltas by module and weights by attention, member by member and token by token, with K, Q and V as matrices."""
    deltas, weights, current = {}, {}, {}
    for path in config.modules:
        x = inputs[path]
        loras = [None if i in excluded else member.modules.get(path) for i, member in enumerate(members)]
        ups = {}
        for i, lora in enumerate(loras):
            if lora is not None:
                bias = 0 if lora.shrink_bias is None else lora.shrink_bias
                ups[i] = (x @ lora.shrink.T + bias) @ lora.expand
        attention = params.attentions.get(path)
        if attention is not None:
            query = x @ attention.query.weight.T + attention.query.bias
            scores = torch.full(
                (len(x), len(members) + config.base_member), float("-inf"), dtype=torch.float64
            )
            for i, up in ups.items():
                key = up @ attention.key.weight.T
                if attention.member_keys is not None:
                    key = key + attention.member_keys[i]
                scores[:, i] = (query * key).sum(dim=1) / config.temperature
            if config.base_member:
                scores[:, -1] = 0
            current[layer_of(path)] = weights[path] = torch.softmax(scores, dim=1)
        total = sum(current[layer_of(path)][:, i : i + 1] * up for i, up in ups.items())
        deltas[path] = value_matrix(config, params, path) @ total.T if isinstance(total, Tensor) else None
    zeros = {path: torch.zeros(len(inputs[path]), 7, dtype=torch.float64) for path in config.modules}
    return {p: zeros[p] if d is None else d.T for p, d in deltas.items()}, weights


def value_matrix(config: FusionConfig, params: FusionParams, path: str) -> Tensor:
    """V as a matrix."""
    value = params.values.get(path)
    width = 7
    if value is None:
        return torch.eye(width, dtype=torch.float64)
    if config.value is ValueKind.DIAGONAL:
        return torch.diag(value.weight)
    return torch.eye(width, dtype=torch.float64) + value.up.weight @ value.down.weight


class _InPool:
    """A fusion in a pool, used by the adapted layers of the server."""

    def __init__(
        self, base: BaseModules, folded: FoldedFusion, start: int = 3, dtype: torch.dtype = torch.float64
    ) -> None:
        self.cell = PlanCell()
        pool = AdapterPool(base, start + folded.num_rows + 2, dtype=dtype, device=torch.device("cpu"))
        self.layers, packing = {}, Packing()
        for path, module in base.by_path.items():
            linear = nn.Linear(module.d_in, module.d_out, bias=False, dtype=dtype)
            nn.init.zeros_(linear.weight)
            self.layers[path] = AdaptedLinear(linear, path, pool.rows(path), self.cell)
            pool.rows(path).write(start, folded.num_rows, folded.pieces(path), packing)
        packing.run()
        self._start = start
        self._folded = folded

    @torch.inference_mode()
    def run(self, inputs: dict[str, Tensor], allowed: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        fused = FusedTokens(0, NUM_TOKENS, self._start, self._folded.rows, allowed)
        self.cell.plan = RowPlan(NUM_TOKENS, fused=(fused,))
        return {path: layer(inputs[path]) for path, layer in self.layers.items()}, fused.weights

    def plan_natively(self, allowed: Tensor) -> FusedSegment:
        """The same plan as a segment, in float32."""
        fused = FusedSegment(0, NUM_TOKENS, self._start, self._folded.rows, allowed)
        self.cell.plan = RowPlan(NUM_TOKENS, segments=plan_segments([], [fused], torch.zeros(0)))
        return fused

    @torch.inference_mode()
    def run_natively(
        self, inputs: dict[str, Tensor], allowed: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        fused = self.plan_natively(allowed)
        return {path: layer(inputs[path].float()) for path, layer in self.layers.items()}, fused.weights


def make_inputs(base: BaseModules, seed: int) -> dict[str, Tensor]:
    return {
        path: random_tokens(NUM_TOKENS, module.d_in, seed + i)
        for i, (path, module) in enumerate(base.by_path.items())
    }


def assert_folded_equals_definition(
    config: FusionConfig, members: Sequence[LoRAWeights], base: BaseModules, excluded: Sequence[int] = ()
) -> None:
    params = make_trained(config, base, seed=11)
    folded = fold_fusion(config, "d" * 64, params, members, torch.float64)
    inputs = make_inputs(base, seed=100)
    allowed = torch.tensor([i not in excluded for i in range(len(members))])
    outputs, weights = _InPool(base, folded).run(inputs, allowed)
    expected, expected_weights = definition(config, params, members, inputs, excluded)
    for path in config.modules:
        torch.testing.assert_close(outputs[path], expected[path], rtol=TOLERANCE, atol=TOLERANCE)
    assert weights.keys() == expected_weights.keys()
    for path, found in weights.items():
        torch.testing.assert_close(found, expected_weights[path], rtol=TOLERANCE, atol=TOLERANCE)
    folded = fold_fusion(config, "d" * 64, params, members, torch.float32)
    natively = _InPool(base, folded, dtype=torch.float32).run_natively(inputs, allowed)
    for found_by_path, expected_by_path in zip(natively, (expected, expected_weights), strict=True):
        for path in expected_by_path:
            torch.testing.assert_close(
                found_by_path[path].double(),
                expected_by_path[path],
                rtol=TOLERANCE_FLOAT32,
                atol=TOLERANCE_FLOAT32,
            )


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("value", ValueKind)
@pytest.mark.parametrize("member_keys", [True, False])
@pytest.mark.parametrize("base_member", [True, False])
def test_folded_equals_the_definition(
    scope: Scope, value: ValueKind, member_keys: bool, base_member: bool
) -> None:
    base = make_base()
    members = [make_member(base, seed, ranks) for seed, ranks in enumerate(MEMBER_RANKS)]
    config = make_config(
        base,
        members,
        scope=scope,
        value=value,
        value_rank=2 if value is ValueKind.LOW_RANK else 0,
        member_keys=member_keys,
        base_member=base_member,
        temperature=1.7,
    )
    assert_folded_equals_definition(config, members, base)


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("member_keys", [True, False])
def test_members_that_lack_modules_are_masked_there(scope: Scope, member_keys: bool) -> None:
    base = make_base()
    ranks = ((0, 2, 3, 0), (1, 0, 0, 4), (2, 2, 5, 1))
    members = [make_member(base, seed, rank) for seed, rank in enumerate(ranks)]
    config = make_config(base, members, scope=scope, member_keys=member_keys)
    assert_folded_equals_definition(config, members, base)


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("base_member", [True, False])
@pytest.mark.parametrize("excluded", [(0,), (1, 3), (0, 1, 2)])
def test_excluded_members_leave_the_softmax(
    scope: Scope, base_member: bool, excluded: tuple[int, ...]
) -> None:
    base = make_base()
    members = [make_member(base, seed, ranks) for seed, ranks in enumerate(MEMBER_RANKS)]
    config = make_config(base, members, scope=scope, base_member=base_member)
    assert_folded_equals_definition(config, members, base, excluded)


def test_a_fusion_of_one_member_equals_that_member() -> None:
    base = make_base()
    member = make_member(base, 5, (3, 2, 4, 1))
    config = make_config(base, [member])
    folded = fold_fusion(config, "", make_trained(config, base, 1), [member], torch.float64)
    inputs = make_inputs(base, 7)
    outputs, weights = _InPool(base, folded).run(inputs, torch.tensor([True]))
    for path, lora in member.modules.items():
        bias = 0 if lora.shrink_bias is None else lora.shrink_bias
        alone = (inputs[path] @ lora.shrink.T + bias) @ lora.expand
        torch.testing.assert_close(outputs[path], alone, rtol=TOLERANCE, atol=TOLERANCE)
    assert all((found == 1).all() for found in weights.values())


def test_identical_members_equal_one() -> None:
    base = make_base()
    member = make_member(base, 5, (3, 2, 4, 1))
    config = make_config(base, [member] * 3)
    folded = fold_fusion(config, "", make_trained(config, base, 1), [member] * 3, torch.float64)
    inputs = make_inputs(base, 7)
    outputs, _ = _InPool(base, folded).run(inputs, torch.ones(3, dtype=torch.bool))
    for path, lora in member.modules.items():
        bias = 0 if lora.shrink_bias is None else lora.shrink_bias
        alone = (inputs[path] @ lora.shrink.T + bias) @ lora.expand
        torch.testing.assert_close(outputs[path], alone, rtol=TOLERANCE, atol=TOLERANCE)


def test_another_members_overflow_stays_out_of_the_scores() -> None:
    base = make_base()
    members = [make_member(base, seed, ranks) for seed, ranks in enumerate(MEMBER_RANKS)]
    config = make_config(base, members)
    folded = fold_fusion(config, "", make_trained(config, base, 1), members, torch.float64)
    path = config.modules[0]
    folded.scores[path].shrink[:3] = float("inf")  # of member 0, which is excluded
    allowed = torch.tensor([False, True, True, True])
    outputs, weights = _InPool(base, folded).run(make_inputs(base, 7), allowed)
    assert all(output.isfinite().all() for output in outputs.values())
    assert (weights[path][:, 0] == 0).all()


@pytest.mark.parametrize("scope", Scope)
def test_modules_that_share_an_input_are_computed_together(scope: Scope) -> None:
    """An attention in the middle of a group sets the coefficients of what stands behind it only."""
    base = make_base()
    members = [make_member(base, seed, ranks) for seed, ranks in enumerate(MEMBER_RANKS)]
    config = make_config(base, members, scope=scope)
    folded = fold_fusion(config, "", make_trained(config, base, 1), members, torch.float32)
    pool = _InPool(base, folded, dtype=torch.float32)
    sizes = [module.d_in for module in base.by_path.values()]
    paths = [path for path, module in base.by_path.items() if module.d_in == sizes[0]]
    assert len(paths) > 1
    x = random_tokens(NUM_TOKENS, sizes[0], 5).float()
    pool.plan_natively(torch.ones(len(members), dtype=torch.bool))
    with torch.inference_mode():
        together = Projections([pool.layers[path] for path in paths])(x)
        apart = [pool.layers[path](x) for path in paths]
    for found, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("member_keys", [False, True])
@pytest.mark.parametrize("value", ValueKind)
@pytest.mark.parametrize("scope", Scope)
def test_size_is_known_before_anything_is_folded(
    scope: Scope, value: ValueKind, member_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base()
    members = [make_member(base, seed, ranks) for seed, ranks in enumerate(MEMBER_RANKS)]
    config = make_config(base, members, scope=scope, value=value, value_rank=2, member_keys=member_keys)
    read = ReadFusion(config, make_trained(config, base, seed=1), "0" * 64)
    folded = fold_fusion(config, read.digest, read.params, members, torch.float32)
    assert count_bytes(config, read.params, members, torch.float32) == folded.nbytes
    assert plan_rows(config, read.params, members).num_rows == folded.num_rows
    limits = {"dtype": torch.float32, "budget_bytes": folded.nbytes, "max_rows": folded.num_rows}
    assert fold_over(read, members, base, FusionPolicy(**limits)).nbytes == folded.nbytes
    monkeypatch.setattr(loader, "fold_fusion", None)
    for name in ("budget_bytes", "max_rows"):
        with pytest.raises(CapacityError, match="the fusion takes"):
            fold_over(read, members, base, FusionPolicy(**{**limits, name: limits[name] - 1}))


EMBEDDING = "model.embed_tokens"


def with_embedding(layers: BaseModules) -> BaseModules:
    """The same modules behind an input embedding."""
    embedding = BaseModule(path=EMBEDDING, kind=ModuleKind.EMBEDDING, d_in=11, d_out=HIDDEN, has_bias=False)
    return replace(layers, by_path={embedding.path: embedding, **layers.by_path})


@pytest.mark.parametrize(
    ("path", "why"), [(EMBEDDING, "cannot weigh changes of the input"), ("model.nothing", "no such module")]
)
def test_fusion_of_a_module_that_none_can_act_on_is_refused(path: str, why: str) -> None:
    base = make_base()
    config = make_config(base, [make_member(base, 0, MEMBER_RANKS[0])])
    with pytest.raises(ArtifactError, match=why) as caught:
        in_call_order(replace(config, modules=(path, *config.modules)), with_embedding(base))
    assert caught.value.reason == "UNKNOWN_MODULE"


def test_member_that_changes_the_embedding_is_refused() -> None:
    """Its rows there have no place in a fusion, which would be served without them."""
    layers = make_base()
    base = with_embedding(layers)
    members = [make_member(base, 0, (0, 2, 2, 2, 2)), make_member(base, 1, (2, 2, 2, 2, 2))]
    config = make_config(layers, members)
    read = ReadFusion(config, make_trained(config, base, seed=1), "0" * 64)
    policy = FusionPolicy(dtype=torch.float32, budget_bytes=1 << 30, max_rows=1 << 10)
    with pytest.raises(ArtifactError, match="member m1 changes the input embedding") as caught:
        fold_over(read, members, base, policy)
    assert caught.value.reason == "MEMBER_UNSUPPORTED"


@pytest.mark.parametrize("value", ValueKind)
def test_rows_of_its_own_lie_in_pinned_memory_for_a_pool_on_a_gpu(
    value: ValueKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base()
    members = [make_member(base, seed, ranks) for seed, ranks in enumerate(MEMBER_RANKS)]
    config = make_config(base, members, value=value, value_rank=2, member_keys=True)
    read = ReadFusion(config, make_trained(config, base, seed=1), "0" * 64)
    limits = {"dtype": torch.float64, "budget_bytes": 1 << 30, "max_rows": 1 << 10}
    pinned = count_pinned(monkeypatch)
    expected = fold_over(read, members, base, FusionPolicy(**limits))
    assert not pinned
    folded = fold_over(read, members, base, FusionPolicy(**limits, pins_rows=True))
    assert len(pinned) == 1 and pinned[0].nbytes == expected.nbytes
    assert folded.nbytes == pinned_bytes(expected.nbytes) > expected.nbytes
    tight = {**limits, "pins_rows": True}
    assert fold_over(read, members, base, FusionPolicy(**{**tight, "budget_bytes": folded.nbytes}))
    with pytest.raises(CapacityError, match="the fusion takes"):
        fold_over(read, members, base, FusionPolicy(**{**tight, "budget_bytes": folded.nbytes - 1}))
    theirs = [t for m in members for lora in m.modules.values() for t in (lora.shrink, lora.expand)]
    theirs += [
        lora.shrink_bias for m in members for lora in m.modules.values() if lora.shrink_bias is not None
    ]
    for path in base.by_path:
        for ours, other in zip(folded.pieces(path), expected.pieces(path), strict=True):
            for name in ("shrink", "expand", "shrink_bias"):
                tensor = getattr(ours, name)
                assert is_pinned(tensor, [*pinned, *theirs])
                assert tensor is None or torch.equal(tensor, getattr(other, name))
