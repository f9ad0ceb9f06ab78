"""What every room stands on: params, the stage contract, checkpoints, batches, training, hardware, timing, tracking."""
