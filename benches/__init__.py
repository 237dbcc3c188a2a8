"""The benchmark suite: every op against its reference, its peers and the limit. Installed as ``kdkernels.benches``; run by ``kdkernels bench``."""
