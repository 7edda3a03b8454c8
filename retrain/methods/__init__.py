"""Methods that retrain a network layer by layer, over a `retrain.stream.stream.LayerStream`."""
