"""Ways to run networks in PyTorch: number formats, 8-bit layers, compilation and rearranged weights."""
