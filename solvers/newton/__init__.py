"""The semismooth Newton method: layer, block of units, shared work, one unit."""
