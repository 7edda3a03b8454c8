"""Benches: seeded problems, peers in the same run, result rows."""
