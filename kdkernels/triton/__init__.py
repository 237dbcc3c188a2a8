"""Triton kernels, one module per op. Imported by an op when it first runs on a GPU, never by ``import kdkernels``."""
