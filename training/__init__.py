"""Training: shards to batches, the distillation losses, the loop, checkpoints and reports."""
