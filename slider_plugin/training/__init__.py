"""The training loop, its noise and its checkpoints."""
