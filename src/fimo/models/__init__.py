"""The final model: networks, losses, training, checkpoints."""
