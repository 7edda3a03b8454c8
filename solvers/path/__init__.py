"""Solutions along epsilon: the path, a number of zeros along it, the search for a root."""
