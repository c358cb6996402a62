"""Command-line tools beside the training run."""
