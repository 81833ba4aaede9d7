"""What a base is computed with: which modules are packed, and which layers are the engine's own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from served_adapters import blend, collect_all, lora, make_params, make_prompt, running_engine
from tiny_models import CONFIGS, FAMILIES, make_tiny_model, save_tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fusionserve.adapters.adapted_embedding import AdaptedEmbedding
from fusionserve.adapters.adapted_linear import AdaptedLinear
from fusionserve.config import EMBEDDED_ADAPTERS, EMBEDDED_FUSIONS, EMBEDDED_MODEL, EngineConfig
from fusionserve.engine.base_model import BaseModel, load_base_model
from fusionserve.engine.decoder_layer import DecoderLayer
from fusionserve.engine.layer_form import RotaryForm
from fusionserve.engine.model_form import model_form
from fusionserve.engine.rotary_table import RotaryTable
from fusionserve.generation import Adaptation, OutputOptions
from fusionserve.kernels.linear_product import PanelEmbedding
from fusionserve.kernels.native_layer import NativeLayer, NativeLayers
from fusionserve.kernels.packed_linear import PackedLinear, can_pack

needs_packing = pytest.mark.skipif(
    not can_pack(torch.zeros(16, 2, dtype=torch.bfloat16)), reason="the processor has no packed product"
)


def load(directory: Path, dtype: str = "float32") -> BaseModel:
    return load_base_model(EngineConfig(model=str(directory), model_name="m", dtype=dtype, num_threads=1))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"hidden_act": "mish"}),
        ("olmo", {"clip_qkv": 1.0}),
        ("stablelm", {"qk_layernorm": True}),
        ("phi", {"qk_layernorm": True}),
        ("cohere", {"use_qk_norm": True}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"_remove_final_layer_norm": True}),
        ("opt", {"word_embed_proj_dim": 32}),
    ],
    ids=str,
)
def test_model_of_a_known_family_that_is_something_else_has_none(
    name: str, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIGS[name]()
    for setting, value in settings.items():
        setattr(config, setting, value)
    make_tiny_model(config).save_pretrained(tmp_path)
    assert load(tmp_path).decoder is None
    assert "decoder of our own for" not in caplog.text  # it was not tried


def test_model_without_adapted_modules_has_none(tmp_path: Path) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(save_tiny_model("llama", tmp_path))
    assert model_form(model, {}) is None


@pytest.mark.parametrize("name", sorted(FAMILIES - {"gpt2", "opt"}))
def test_angles_are_those_that_the_model_computes(name: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(save_tiny_model(name, tmp_path))
    embedding = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).base_model.rotary_emb
    like, positions = torch.empty(0, dtype=torch.bfloat16), torch.tensor([7, 0, 63, 3])
    for layer_type in sorted(set(config.layer_types)) if name in {"gemma3", "olmo3"} else [""]:
        form = RotaryForm(
            layer_type=layer_type, by_neighbours=False, has_neighbours=name.startswith("cohere")
        )
        table = RotaryTable(embedding, 64, torch.bfloat16, form, torch.device("cpu"))
        options = {"layer_type": layer_type} if layer_type else {}
        expected = embedding(like, position_ids=positions[None], **options)
        for mine, theirs in zip(table.angles(positions)[:2], expected, strict=True):
            halves = torch.cat([theirs[..., ::2]] * 2, dim=-1) if form.has_neighbours else theirs
            assert torch.equal(mine, halves[0].float())


def test_angles_of_a_long_context_are_computed_piece_by_piece(tmp_path: Path) -> None:
    """What the model computes in between is several times the table."""
    config = AutoConfig.from_pretrained(save_tiny_model("llama", tmp_path))
    embedding = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).base_model.rotary_emb
    pieces: list[int] = []
    embedding.register_forward_hook(lambda _, __, output: pieces.append(output[0].shape[1]))
    form = RotaryForm(layer_type="", by_neighbours=False, has_neighbours=False)
    table = RotaryTable(embedding, 9000, torch.bfloat16, form, torch.device("cpu"))
    assert max(pieces) <= 4096
    positions = torch.tensor([0, 4095, 4096, 8191, 8192, 8999])
    expected = embedding(torch.empty(0, dtype=torch.bfloat16), position_ids=positions[None])
    for mine, theirs in zip(table.angles(positions)[:2], expected, strict=True):
        assert torch.equal(mine, theirs[0].float())


@needs_packing
@pytest.mark.parametrize("is_native", [True, False])
async def test_layers_that_one_call_has_computed_are_not_called(
    is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(NativeLayer, "can_compute", lambda *_: False)
    called: list[DecoderLayer] = []
    compute = DecoderLayer.compute

    def spy(layer: DecoderLayer, *args: Any) -> torch.Tensor:
        called.append(layer)
        return compute(layer, *args)

    monkeypatch.setattr(DecoderLayer, "compute", spy)
    async with running_engine(
        EMBEDDED_MODEL, None, model_name="fusionserve-tiny", dtype="bfloat16"
    ) as engine:
        await collect_all(engine, [make_params("1", Adaptation(), make_prompt(1, 8), num_tokens=3)])
    counts = Counter(called)
    assert len(counts) == (0 if is_native else AutoConfig.from_pretrained(EMBEDDED_MODEL).num_hidden_layers)
    assert len(set(counts.values())) <= 1  # each in every step


@needs_packing
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_base_is_packed_and_held_once(dtype: str) -> None:
    base = load(EMBEDDED_MODEL, dtype)
    linear = [module for module in base.model.modules() if isinstance(module, AdaptedLinear)]
    assert linear and all(isinstance(module.base, PackedLinear) for module in linear)
    original = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=getattr(torch, dtype))
    assert base.weight_bytes == sum(parameter.nbytes for parameter in original.parameters())
    for path, module in original.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert torch.equal(base.base_weight(path), module.weight), path


@needs_packing
def test_tied_embedding_reads_the_memory_of_the_head() -> None:
    model = load(EMBEDDED_MODEL, "bfloat16").model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, AdaptedEmbedding) and isinstance(embedding.base, PanelEmbedding)
    assert isinstance(head.base, PackedLinear)
    assert embedding.base.head.packed.data_ptr() == head.base.packed.data_ptr()


@needs_packing
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(bits, dtype) for bits in ("none", "int8") for dtype in ("bfloat16", "float32", "float16")],
)
@pytest.mark.usefixtures("helpers")  # each with tokens of its own, also from the middle of a request on
async def test_native_layer_gives_the_bits_of_its_kernels_one_by_one(
    bits: str, dtype: str, native_passes: list[NativeLayers], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_call, num_steps = await logprobs_of_every_kind(bits, dtype)
    assert len(native_passes) == num_steps + 1  # and the one that tried the layers when they were loaded
    monkeypatch.setattr(NativeLayer, "can_compute", lambda *_: False)
    native_passes.clear()
    one_by_one, _ = await logprobs_of_every_kind(bits, dtype)
    assert not native_passes
    assert one_by_one == one_call


async def logprobs_of_every_kind(bits: str, dtype: str) -> tuple[list[object], int]:
    """Of prompt and continuation: base, LoRA, blend and fusion, together in a batch; and how many steps it took."""
    kinds = (Adaptation(), lora("cpp"), blend(perl=0.5, spanish=0.5), Adaptation("fusion", fusion="domains"))
    length = 28 if dtype == "float32" else 150  # longer ones go through products of their own
    settings = {"dtype": dtype, "quantize": bits, "fusion_dirs": (EMBEDDED_FUSIONS,)} | {
        "adapter_pool_ranks": 512
    }
    async with running_engine(
        EMBEDDED_MODEL, EMBEDDED_ADAPTERS, model_name="fusionserve-tiny", **settings
    ) as engine:
        output = OutputOptions(logprobs=3, prompt_logprobs=3)
        requests = [
            make_params(str(n), kind, make_prompt(n, length), output=output, num_tokens=12)
            for n, kind in enumerate(kinds)
        ]
        outcomes = await collect_all(engine, requests)
        await engine.unload_fusion("domains", force=False)
    finished = [outcome.finished for outcome in outcomes]
    return [(each.prompt_logprobs, each.candidates[0].logprobs) for each in finished], engine.runner.num_steps
