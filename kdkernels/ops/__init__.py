"""One module per op: the public function, its checks, fake kernel, transforms, and the hook to its Triton kernels."""
