"""Command that trains one LoRA adapter for each domain with PEFT."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusionserve.config import EMBEDDED_MODEL_NAME
from fusionserve.training.corpus import train_path
from fusionserve.training.loop import LOSSES, Schedule, train
from fusionserve.training.sources import ADAPTER_SOURCES
from fusionserve.training.tokens import TokenStream, WindowShape, encode_file, random_windows

RANKS = {"spanish": 32, "polish": 32, "perl": 32, "cpp": 32, "changelog": 16}
ADAPTED_MODULES = ["o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """Everything that decides the result of an adapter training run."""

    steps: int
    rank: int
    shape: WindowShape
    learning_rate: float
    precision: str
    seed: int


def make_adapted_model(base: Path, rank: int) -> PeftModel:
    """Load the base in float32 and put an untrained LoRA of the rank on every projection."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=ADAPTED_MODULES, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def train_adapter(model: PeftModel, stream: TokenStream, run: AdapterRun) -> dict[str, object]:
    """Train the adapter in place on one domain and return what the model card needs to know."""
    started = time.monotonic()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches: Iterator[torch.Tensor] = random_windows([stream], run.shape, np.random.default_rng(run.seed))
    schedule = Schedule(run.steps, warmup_steps=min(20, run.steps // 10 + 1))
    optimizer = AdamW(weights, lr=run.learning_rate, weight_decay=0.0)
    loss = train(model, [optimizer], batches, schedule, LOSSES[run.precision])
    parameters = sum(weight.numel() for weight in weights)
    seconds = round(time.monotonic() - started)
    return {
        "domain": stream.domain,
        "run": asdict(run),
        "parameters": parameters,
        "loss": loss,
        "seconds": seconds,
    }


def save_adapter(model: PeftModel, out: Path) -> None:
    """Save configuration and bfloat16 weights as PEFT writes them, naming the base and no path."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    config.base_model_name_or_path = EMBEDDED_MODEL_NAME
    config.target_modules = sorted(ADAPTED_MODULES)  # PEFT made it a set, which has no fixed order
    model.to(torch.bfloat16).save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)


def main() -> None:
    """Train and save the adapters of the chosen domains."""
    arguments = _parser().parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    shape = WindowShape(arguments.batch_tokens // arguments.sequence_length, arguments.sequence_length)
    for domain in arguments.domains:
        torch.manual_seed(arguments.seed)
        run = AdapterRun(
            steps=arguments.steps,
            rank=RANKS[domain],
            shape=shape,
            learning_rate=arguments.learning_rate,
            precision=arguments.precision,
            seed=arguments.seed,
        )
        model = make_adapted_model(arguments.base, run.rank)
        summary = train_adapter(model, encode_file(train_path(arguments.corpus, domain), tokenizer), run)
        save_adapter(model, arguments.out / domain)
        print(json.dumps(summary), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one folder for each domain")
    parser.add_argument(
        "--domains", nargs="*", choices=sorted(ADAPTER_SOURCES), default=list(ADAPTER_SOURCES)
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--precision", choices=sorted(LOSSES), default="float32", help="type of the products")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
