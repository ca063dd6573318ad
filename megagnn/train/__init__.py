"""Training, evaluation, prediction, and what is shown of them."""
