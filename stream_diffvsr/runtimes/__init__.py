"""Runtimes: the libraries that run the networks, and ways to use these libraries."""
