"""Torch networks: their layers, rows, gains, and the stream that methods work on."""
