"""The benchmark suite, which times each op against its reference, its peers and hardware limits.

It is installed as ``kdkernels.benches`` and run by ``kdkernels bench``.
"""
