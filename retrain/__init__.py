"""Convex and second-order retraining of trained networks, with certificates."""
