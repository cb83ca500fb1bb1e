"""Jobs, which upscale one file or many from source to result."""
