"""A served fusion weighs what PEFT's own layers compute: every kind of scaling, rank and bias that members may have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft_adapters import adapt, layer_delta, lora_layers, reload, save
from served_adapters import collect, make_model, make_params, running_engine, write_model
from torch import Tensor, nn

from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.adapters.base_modules import describe_base_modules
from fusionserve.adapters.lora_loader import LoadPolicy, load_lora_weights
from fusionserve.fusion.artifact import save_fusion
from fusionserve.fusion.config import FusionConfig, FusionMember, Scope
from fusionserve.fusion.params import FusionParams, layer_of
from fusionserve.fusion.params import make_params as make_fusion_params
from fusionserve.generation import Adaptation, OutputOptions

pytestmark = pytest.mark.gpu

PROMPT = (5, 9, 17, 4, 30, 22, 8)
NUM_TOKENS = 12
MAX_LOGPROB_ERROR = 2e-4
MEMBERS: dict[str, dict[str, object]] = {
    "scaled": {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "r": 9, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear",
        "r": 3,
        "lora_alpha": 2,
        "rank_pattern": {"down_proj": 7, r"layers\.0\..*": 1},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 16, "v_proj": 5},
    },
    "biased": {"target_modules": ["q_proj", "gate_proj"], "lora_bias": True, "lora_alpha": 6},
    "one_layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
}


class PeftFused(nn.Module):
    """y = W0 x + sum_i a_i up_i with every up_i from PEFT's layer, and a from the definition of the scores."""

    def __init__(
        self,
        base: nn.Module,
        layers: list[LoraLayer | None],
        attention: nn.Module | None,
        shared: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.base = base
        self._layers = layers  # a plain list: not modules of this model
        self._attention = attention
        self._shared = shared  # the weights at hand of this layer of the model

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base(x)
        zeros = torch.zeros_like(output)
        ups = torch.stack(
            [zeros if layer is None else layer_delta(layer, x) for layer in self._layers], dim=-2
        )
        if self._attention is not None:
            scores = self._attention.scores(x[0], ups[0])  # type: ignore[operator]
            absent = torch.tensor([layer is None for layer in self._layers])
            self._shared["weights"] = torch.softmax(scores.masked_fill(absent, float("-inf")), dim=-1)
        return output + (self._shared["weights"].unsqueeze(-1) * ups).sum(dim=-2)


def write_members(root: Path) -> None:
    for seed, (name, options) in enumerate(MEMBERS.items()):
        torch.manual_seed(seed)
        save(adapt(make_model("llama"), **options), root / name)


def write_fusion(directory: Path, adapters: Path, scope: Scope) -> tuple[FusionConfig, FusionParams]:
    """A fusion of all members with lively random parameters."""
    base = describe_base_modules(make_model("llama"), model_name="tiny")
    weights = []
    for name in MEMBERS:
        with open_directory(adapters / name) as opened:
            policy = LoadPolicy(dtype=torch.float32, max_rank=64)
            weights.append(
                load_lora_weights(
                    opened, base, policy=policy, budget_bytes=1 << 30, base_weight=lambda _: torch.empty(0)
                )
            )
    config = FusionConfig(
        name="all",
        base_model="tiny",
        base_fingerprint=base.fingerprint,
        members=tuple(FusionMember(name, found.digest) for name, found in zip(MEMBERS, weights, strict=True)),
        modules=tuple(path for path in base.by_path if any(path in found.modules for found in weights)),
        scope=scope,
        d_key=6,
    )
    torch.manual_seed(3)
    params = make_fusion_params(config, base)
    for _, parameter in params.named_tensors():
        parameter.data += torch.randn_like(parameter) * 0.3
    save_fusion(directory, config, params)
    return config, params


@torch.inference_mode()
def peft_logprobs(
    config: FusionConfig, params: FusionParams, adapters: Path, tokens: tuple[int, ...]
) -> Tensor:
    """Log-probabilities [tokens, vocab] of the base with PEFT's layers beside every module."""
    model = make_model("llama")
    members = [lora_layers(reload(model, adapters / name)) for name in MEMBERS]
    shared: dict[str, dict[str, Tensor]] = {}
    for path in config.modules:
        parent, _, name = path.rpartition(".")
        fused = PeftFused(
            model.get_submodule(path),
            [member.get(path) for member in members],
            params.attentions.get(path),
            shared.setdefault(layer_of(path), {}),
        )
        setattr(model.get_submodule(parent), name, fused)
    return torch.log_softmax(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0], dim=-1)


@pytest.mark.parametrize("scope", Scope)
async def test_served_fusion_weighs_what_peft_computes(tmp_path: Path, scope: Scope) -> None:
    adapters = tmp_path / "adapters"
    write_members(adapters)
    config, params = write_fusion(tmp_path / "fusions" / "all", adapters, scope)
    options = {"fusion_dirs": (tmp_path / "fusions",), "adapter_pool_ranks": 160}
    request = make_params(
        "one",
        Adaptation("fusion", fusion="all"),
        PROMPT,
        num_tokens=NUM_TOKENS,
        output=OutputOptions(logprobs=3, prompt_logprobs=0),
    )
    async with running_engine(write_model(tmp_path / "model"), adapters, **options) as engine:
        outcome = await collect(engine, request)
        await engine.unload_fusion("all", force=False)
    expected = peft_logprobs(config, params, adapters, (*PROMPT, *outcome.tokens))
    for position, row in enumerate(outcome.finished.candidates[0].logprobs, len(PROMPT) - 1):
        assert row.chosen.token_id == int(expected[position].argmax())
        for token in (row.chosen, *row.top):
            assert abs(token.logprob - float(expected[position, token.token_id])) < MAX_LOGPROB_ERROR
    for position, row in enumerate(outcome.finished.prompt_logprobs):
        assert abs(row.chosen.logprob - float(expected[position, PROMPT[position + 1]])) < MAX_LOGPROB_ERROR
