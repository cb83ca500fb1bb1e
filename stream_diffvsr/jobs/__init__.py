"""Jobs that upscale one or more files, from source to result."""
