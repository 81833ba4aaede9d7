"""Kernels in Triton for one GPU, each beside its definition in torch; Triton's interpreter runs them on a CPU."""
