"""What people call, one verb per file: net_trim, lobs, train, load."""
