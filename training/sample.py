"""Command that shows what the base and every adapter make of the demo prompts."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fusionserve.config import EMBEDDED
from fusionserve.training.perplexity import load_adapted

NEUTRAL = "neutral"


def continuation(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: dict[str, float | int | bool]
) -> str:
    """Give the text that the active adapter, or the base if none is active, adds to the prompt."""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        output = model.generate(  # type: ignore[no-untyped-call]
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pad_token_id=tokenizer.eos_token_id,
            **settings,
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def samples(
    embedded: Path, seed: int, settings: dict[str, float | int | bool]
) -> Iterator[tuple[str, str, str]]:
    """Yield (model, prompt, continuation): each adapter on its own prompt, all models on the neutral one."""
    tokenizer = AutoTokenizer.from_pretrained(embedded / "base")
    model, names = load_adapted(embedded)
    prompts: dict[str, str] = json.loads((embedded / "prompts.json").read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    with model.disable_adapter():
        yield "base", prompts[NEUTRAL], continuation(model, tokenizer, prompts[NEUTRAL], settings)
    for name in names:
        model.set_adapter(name)
        for prompt in (prompts[NEUTRAL], prompts[name]):
            yield name, prompt, continuation(model, tokenizer, prompt, settings)


def main() -> None:
    """Print the samples as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--embedded", type=Path, default=EMBEDDED, help="folder with base, adapters and prompts"
    )
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings: dict[str, float | int | bool] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    if arguments.temperature > 0:
        settings |= {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
    for name, prompt, text in samples(arguments.embedded, arguments.seed, settings):
        print(f"**{name}**\n\n```\n[{prompt}]{text}\n```\n")


if __name__ == "__main__":
    main()
