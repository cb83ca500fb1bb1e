"""Runtimes: the libraries that compute the networks, and ways to use them."""
