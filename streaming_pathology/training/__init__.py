"Networks, losses, the training loop, checkpoints."
