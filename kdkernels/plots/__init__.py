"""Pictures: a file for each. Those of checkpoints need the extra ``train``, drawing itself matplotlib alone."""
