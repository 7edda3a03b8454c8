"""L-OBS and its relatives over a `retrain.stream.stream.LayerStream`."""
