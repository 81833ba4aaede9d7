"""Runs before any test imports torch: tiny models are fastest on one thread, and CI shares its cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
