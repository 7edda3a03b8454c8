"""Net-Trim over a `retrain.stream.stream.LayerStream`."""
