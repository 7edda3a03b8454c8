"""A run: its directory, identity, stages, searches and outcome."""
