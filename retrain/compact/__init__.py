"""Networks made really smaller: what structural removal needs, whoever decides what goes."""
