"""Command that trains the base model: a small Llama that has read a little of every domain."""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.optim import AdamW, Optimizer
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from fusionserve.training.corpus import train_path
from fusionserve.training.loop import LOSSES, Loss, Schedule, train
from fusionserve.training.muon import Muon
from fusionserve.training.sources import BASE_SOURCES
from fusionserve.training.tokens import TokenStream, WindowShape, encode_file, random_windows


@dataclass(frozen=True, slots=True)
class BaseRun:
    """Everything that decides the result of a base training run."""

    steps: int
    long_share: float
    batch_tokens: int
    sequence_length: int
    context: int
    learning_rate: float
    precision: str
    seed: int


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of the decoder."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int


Settings = TypeVar("Settings", BaseRun, Size)


def make_model(size: Size, tokenizer: PreTrainedTokenizerBase, context: int) -> LlamaForCausalLM:
    """Build the untrained decoder with tied embeddings and grouped-query attention."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[Optimizer]:
    """Give Muon the weight matrices inside the layers and AdamW the embedding and the norms."""
    parameters = list(model.named_parameters())
    matrices = [weight for name, weight in parameters if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in parameters if weight.ndim != 2 or "embed" in name]
    muon = Muon(matrices, lr=learning_rate)
    return [muon, AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)]


def make_batches(streams: list[TokenStream], run: BaseRun) -> Iterator[torch.Tensor]:
    """Yield short windows first and windows of the whole context for the last `long_share` of the steps."""
    generator = np.random.default_rng(run.seed)
    short = WindowShape(run.batch_tokens // run.sequence_length, run.sequence_length)
    long = WindowShape(run.batch_tokens // run.context, run.context)
    short_steps = round(run.steps * (1 - run.long_share))
    return chain(
        islice(random_windows(streams, short, generator), short_steps),
        random_windows(streams, long, generator),
    )


def train_base(model: LlamaForCausalLM, streams: list[TokenStream], run: BaseRun) -> dict[str, object]:
    """Train in place and return what the model card needs to know about the run."""
    started = time.monotonic()
    schedule = Schedule(run.steps, warmup_steps=min(50, run.steps // 10 + 1))
    optimizers = make_optimizers(model, run.learning_rate)
    compiled: Loss = torch.compile(LOSSES[run.precision], dynamic=False)
    loss = train(model, optimizers, make_batches(streams, run), schedule, compiled)
    seconds = round(time.monotonic() - started)
    tokens = {stream.domain: len(stream.tokens) for stream in streams}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"run": asdict(run), "parameters": parameters, "tokens": tokens, "loss": loss, "seconds": seconds}


def save_base(model: LlamaForCausalLM, tokenizer_folder: Path, out: Path) -> None:
    """Save weights, configuration, generation defaults and tokenizer to one directory.

    The weights are rounded to bfloat16 and stored as float32: served in either type they are the same numbers, and
    processors without bfloat16 instructions are not slowed down by default.
    """
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id
    )
    model.bfloat16().to(torch.float32).save_pretrained(out)  # type: ignore[arg-type]
    shutil.copytree(tokenizer_folder, out, dirs_exist_ok=True)


def main() -> None:
    """Train and save the base model; the last line printed sums up the run as JSON."""
    arguments = _parser().parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    run = _from_arguments(BaseRun, arguments)
    paths = [train_path(arguments.corpus, domain) for domain in sorted(BASE_SOURCES)]
    streams = [encode_file(path, tokenizer) for path in paths]
    model = make_model(_from_arguments(Size, arguments), tokenizer, run.context)
    summary = train_base(model, streams, run)
    save_base(model, arguments.tokenizer, arguments.out)
    print(json.dumps(summary))


def _from_arguments(kind: type[Settings], arguments: argparse.Namespace) -> Settings:
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--long-share", type=float, default=0.15, help="share of steps at the whole context")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--precision", choices=sorted(LOSSES), default="float32", help="type of the products")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
