"""Reading and writing of media files, independent of any model."""
