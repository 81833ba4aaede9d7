"""Adapters: their files, their life cycle, their rows in the pool, and the layers that apply them."""
