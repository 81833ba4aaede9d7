"""The same work by transformers' `generate`, and by PEFT's mixed batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from fusionserve.loadtest.gpu.device_limit import wait_for
from fusionserve.loadtest.model_shapes import make_model


class PeerRounds:
    """A random model on the device, later with adapters on it."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self._device = device
        self._model: Any = make_model(shape, device)
        self._names: list[str] = []

    def put_adapters_on(self, adapters: Sequence[Path]) -> None:
        """From here on, stream n has the n-th, over and over; in bfloat16, where PEFT's default is float32."""
        self._names = [path.name for path in adapters]
        self._model = PeftModel.from_pretrained(
            self._model, adapters[0], adapter_name=self._names[0], autocast_adapter_dtype=False
        )
        for path in adapters[1:]:
            self._model.load_adapter(path, adapter_name=path.name, autocast_adapter_dtype=False)
        self._model.eval()

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Seconds of one call; all prompts have one length, so nothing is padded."""
        tokens = torch.tensor(prompts, device=self._device)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, max_new_tokens=new_tokens, eos_token_id=None
        )
        names = (
            [self._names[stream % len(self._names)] for stream in range(len(prompts))] if self._names else []
        )
        wait_for(self._device)
        started_s = time.monotonic()
        with torch.inference_mode():
            self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=settings,
                **({"adapter_names": names} if names else {}),
            )
        wait_for(self._device)
        return time.monotonic() - started_s
