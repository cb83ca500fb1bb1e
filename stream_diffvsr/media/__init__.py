"""Read and write media files, independently of any model."""
