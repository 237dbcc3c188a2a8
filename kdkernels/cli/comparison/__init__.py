"""``kdkernels compare`` without its command line: methods, trainings, statistics and cost."""
