"""Files of torch networks: read, written, described so that they can be built again."""
