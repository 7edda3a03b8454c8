"""What a method sees of a network: layers, batches, reports; and the chain of arrays."""
