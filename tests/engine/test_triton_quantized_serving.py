"""A base in 8 and 4 bits over the kernels of a GPU: what the CPU's give, in any company, from one copy of the weights.

Without a GPU Triton interprets the kernels, as in `test_triton_serving.py`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import served_adapters
import torch
from device_kernels import DEVICE, serve_in_triton
from safetensors.torch import load_file, save_file
from served_adapters import (
    Outcome,
    TestedEngine,
    blend,
    collect,
    collect_all,
    lora,
    make_params,
    make_prompt,
    running_engine,
    write_lora,
    write_model,
)
from served_fusions import write_fusion
from torch import nn
from transformers import AutoModelForCausalLM

from fusionserve.adapters.adapted_embedding import AdaptedEmbedding
from fusionserve.adapters.adapted_linear import AdaptedLinear
from fusionserve.adapters.base_modules import describe_base_modules
from fusionserve.config import EMBEDDED_MODEL
from fusionserve.engine import panels
from fusionserve.engine.base_model import BaseModel
from fusionserve.engine.decode_graphs import GraphSize
from fusionserve.engine.panels import bring_into_panels
from fusionserve.engine.quantized_base import BITS
from fusionserve.generation import Adaptation, GenerateParams, OutputOptions
from fusionserve.kernels.linear_product import PanelEmbedding
from fusionserve.kernels.tiled_linear import TiledLinear

pytestmark = pytest.mark.gpu

# Of log-probabilities, at most and on average: inputs in 8 bits make a last digit larger, here and there.
SMALL_MODEL, EMBEDDED = (0.1, 2e-3), (0.2, 0.05)
OUTPUT = OutputOptions(logprobs=3, prompt_logprobs=3)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of whole groups, two adapters, a DoRA one, and a fusion."""
    monkeypatch.setattr(served_adapters, "INNER", 96)  # three groups, which leave half a line of 4 bits empty
    write_model(tmp_path / "model", "tied_llama")
    for seed, name in enumerate(("ada", "bea", "dora")):
        write_lora(tmp_path / "adapters" / name, seed=seed, rank=3 + seed)
    make_dora(tmp_path / "adapters" / "dora")
    write_fusion(tmp_path / "fusions", "mix", ("ada", "bea"), tmp_path / "adapters", seed=1)
    return tmp_path


def make_dora(directory: Path) -> None:
    """Gives a LoRA adapter magnitudes."""
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    tensors = load_file(directory / "adapter_model.safetensors")
    for name, tensor in list(tensors.items()):
        if "lora_B" in name:
            magnitude = torch.rand(len(tensor), generator=torch.Generator().manual_seed(3)) + 1
            tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = magnitude
    save_file(tensors, directory / "adapter_model.safetensors")


@asynccontextmanager
async def serving(
    folders: Path, bits: str, device: str, dtype: str = "float32"
) -> AsyncIterator[TestedEngine]:
    options = {"quantize": bits, "device": device, "dtype": dtype, "fusion_dirs": (folders / "fusions",)}
    async with running_engine(folders / "model", folders / "adapters", **options) as engine:
        yield engine
        await engine.unload_fusion("mix", force=False)


def requests(output: OutputOptions | None = OUTPUT) -> list[GenerateParams]:
    kinds = [Adaptation(), lora("ada"), lora("dora"), blend(ada=0.3, bea=0.9)]
    kinds.append(Adaptation("fusion", fusion="mix"))
    # Together more than 32, for the largest tile; the last fills a block and begins one.
    lengths = (5, 3, 7, 4, 18)
    return [
        make_params(f"r{n}", kind, make_prompt(n, length), num_tokens=2, output=output)
        for n, (kind, length) in enumerate(zip(kinds, lengths, strict=True))
    ]


def logprobs(outcomes: list[Outcome]) -> torch.Tensor:
    """Of prompts and continuations, the chosen token's and the best three, in one row."""
    reports = [(*o.finished.prompt_logprobs, *o.finished.candidates[0].logprobs) for o in outcomes]
    rows = [row for report in reports for row in report]
    return torch.tensor([entry.logprob for row in rows for entry in (row.chosen, *row.top)])


def assert_near(
    found: list[Outcome], expected: list[Outcome], limits: tuple[float, float] = SMALL_MODEL
) -> None:
    assert [outcome.tokens for outcome in found] == [outcome.tokens for outcome in expected]
    errors = (logprobs(found) - logprobs(expected)).abs()
    assert float(errors.max()) < limits[0] and float(errors.mean()) < limits[1]


@pytest.mark.parametrize("bits", BITS)
async def test_every_kind_gets_in_triton_what_the_cpu_gives_and_the_same_alone(
    bits: str, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(folders, bits, "cpu") as engine:
        expected = await collect_all(engine, requests())
    serve_in_triton(monkeypatch)
    async with serving(folders, bits, DEVICE.type) as engine:
        found = await collect_all(engine, requests())
        alone = [await collect(engine, request) for request in requests()]
        graphs = engine.runner._runner._graphs
        assert graphs is not None and GraphSize(1) in graphs._graphs, "decoding steps were not replayed"
        check_modules(engine.runner._runner._base, BITS[bits])
    assert_near(found, expected)
    assert_near(found, alone)
    assert len({outcome.tokens for outcome in found}) == len(found)


def check_modules(base: BaseModel, bits: int) -> None:
    """Everything linear is in tiles, layers are our own, and the tied embedding reads the head's memory."""
    model, decoder = base.model, base.decoder
    assert decoder is not None
    assert all(group.product is not None for layer in decoder.layers for group in layer.groups)
    linear = {m.path: m.base for m in model.modules() if isinstance(m, AdaptedLinear)}
    assert all(isinstance(base, TiledLinear) for base in linear.values())
    assert {path: base.bits for path, base in linear.items() if path == "lm_head" or base.bits != bits} == {
        "lm_head": 8
    }
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, AdaptedEmbedding) and isinstance(embedding.base, PanelEmbedding)
    assert embedding.base.head.levels.data_ptr() == linear["lm_head"].levels.data_ptr()
    full = [p for p in model.parameters() if p.dim() > 1 and p.dtype not in (torch.int8, torch.bfloat16)]
    assert not full, "a full weight was kept beside the levels"


async def test_bfloat16_gets_the_same_tokens_alone(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_in_triton(monkeypatch)
    async with serving(folders, "int4", DEVICE.type, "bfloat16") as engine:
        together = await collect_all(engine, requests(None))
        alone = [await collect(engine, request) for request in requests(None)]
    assert [outcome.tokens for outcome in together] == [outcome.tokens for outcome in alone]


async def test_embedded_base_gets_in_triton_what_the_cpu_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params("r", Adaptation(), make_prompt(0, 12), num_tokens=1, output=OUTPUT)
    options = {"quantize": "int4", "model_name": "fusionserve-tiny"}
    async with running_engine(EMBEDDED_MODEL, None, **options) as engine:
        expected = await collect(engine, params)
    serve_in_triton(monkeypatch)
    async with running_engine(EMBEDDED_MODEL, None, device=DEVICE.type, **options) as engine:
        assert_near([await collect(engine, params)], [expected], EMBEDDED)


def test_weights_come_to_a_gpu_module_by_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL).eval()
    modules = describe_base_modules(model, model_name="tiny")
    num_full: list[int] = []
    quantize_on = panels.quantize_on

    def spy(device: torch.device, weight: torch.Tensor, bias: torch.Tensor | None, bits: int) -> TiledLinear:
        full = [module for module in model.modules() if type(module) is nn.Linear]
        assert {module.weight.device.type for module in full} == {"cpu"}
        num_full.append(len(full))
        return quantize_on(device, weight, bias, bits)

    monkeypatch.setattr(panels, "quantize_on", spy)
    monkeypatch.setattr(panels, "uses_triton", lambda device: device.type == "meta")
    num_panels = bring_into_panels(model, modules, 4, torch.device("meta"))
    assert num_full == list(range(num_panels, 0, -1))  # each is gone before the next one comes
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"meta"}
