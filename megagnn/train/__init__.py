"""Training, evaluation, checkpoints and what is shown of them."""
