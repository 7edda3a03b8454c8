"""Pages, tables and pictures of finished runs."""
