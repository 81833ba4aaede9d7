"""Runs before any test imports torch or Triton."""

import os

# Tiny models are fastest on one thread, and CI shares its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU Triton's interpreter runs the kernels of `kernels/device`. It must be told before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
