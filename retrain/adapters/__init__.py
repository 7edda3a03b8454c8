"""Torch networks: find layers, stream activations, write back, load and save safely."""
