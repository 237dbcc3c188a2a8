"""Plots. Those of checkpoints need the extra ``train``; ``drawing`` needs only matplotlib."""
