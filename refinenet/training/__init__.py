"""Training with the authors' recipe (paper, section 4): initial weights, step, loop, checkpoints."""
