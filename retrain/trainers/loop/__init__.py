"""The training loop that all trainers share."""
