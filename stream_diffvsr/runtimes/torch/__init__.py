"""PyTorch's own ways: number formats, 8 bits, compiling."""
