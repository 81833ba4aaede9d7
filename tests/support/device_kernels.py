"""The device on which the tests of `kernels/device` run: without a GPU the CPU, where Triton interprets the kernels."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
