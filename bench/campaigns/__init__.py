"""Campaigns: thousands of random cases against one promise each."""
