"""What is tried with the core: the embedded world, RLHF, the papers' claims, the benchmark."""
