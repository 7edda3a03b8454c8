"""Samples and labels: from files, functions, arrays and batches, as one `Data`."""
