"""Triton kernels, one module per op. Each is imported when its op first runs on a GPU."""
