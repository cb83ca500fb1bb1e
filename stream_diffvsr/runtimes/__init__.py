"""Runtimes: the libraries that run the networks, and the code that calls them."""
