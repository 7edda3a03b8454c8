"""ADMM for all units of a layer at once, with one factorisation per layer."""
