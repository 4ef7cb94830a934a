"""What `A3POTrainer` does around the loss: sampling, checks, checkpoints and logs."""
