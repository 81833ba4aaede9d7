"""transformers' `generate` on one batch, and PEFT's mixed batch by `adapter_names`."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from fusionserve.loadtest.bench.protocol import MIXED, Job, Outcome, Setup, answer_jobs


class HuggingFace:
    """The model in memory, and with option `peft` = yes all adapters on it."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.num_threads)
        self._setup = setup
        dtype = getattr(torch, setup.options.get("dtype", "bfloat16"))
        self.versions = {name: version(name) for name in ("transformers", "torch")}
        self._model: Any = AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype)
        if setup.options["peft"] == "yes":
            self.versions["peft"] = version("peft")
            self._model = _with_adapters(self._model, setup)

    def run(self, job: Job) -> Outcome:
        """One call of `generate`; all prompts have one length, so nothing is padded."""
        prompts = torch.tensor(job.prompts)
        sampling = {"temperature": job.temperature, "top_p": job.top_p, "top_k": 0} if job.temperature else {}
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=bool(sampling), max_new_tokens=job.new_tokens, eos_token_id=None, **sampling
        )
        clock = _FirstTokenClock()
        started_s = time.monotonic()
        with torch.inference_mode():
            tokens = self._model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=settings,
                logits_processor=LogitsProcessorList([clock]),
                **self._adapter_names(job),
            )
        total_s = time.monotonic() - started_s
        return Outcome(clock.first_s - started_s, total_s, tokens[:, prompts.shape[1] :].tolist())

    def close(self) -> None:
        """The model goes with the process."""

    def _adapter_names(self, job: Job) -> dict[str, list[str]]:
        if job.kind != MIXED:
            return {}
        streams = range(len(job.prompts))
        return {"adapter_names": [_adapter_name(self._setup.adapter_of(stream)) for stream in streams]}


class _FirstTokenClock(LogitsProcessor):
    """Leaves logits as they are and notes when the first ones came."""

    first_s = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.first_s = self.first_s or time.monotonic()
        return scores


def _with_adapters(model: Any, setup: Setup) -> PeftModel:
    first, *others = (Path(path) for path in setup.adapters)
    adapted = PeftModel.from_pretrained(model, first, adapter_name=_adapter_name(0))
    for index, path in enumerate(others, start=1):
        adapted.load_adapter(path, adapter_name=_adapter_name(index))
    return adapted.eval()


def _adapter_name(index: int) -> str:
    return f"adapter{index}"


if __name__ == "__main__":
    answer_jobs(HuggingFace)
