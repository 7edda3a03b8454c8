"""Recipes of training runs: read, checked, turned into what trains."""
