"""Measures the GPU path beside what the GPU can do and beside transformers and PEFT; nothing is downloaded."""
