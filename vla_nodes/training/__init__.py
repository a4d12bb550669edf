"""Training: stages, losses, the trainer, and the language encoder."""
