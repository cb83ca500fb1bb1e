"""Video and pictures: file in, file out. `job.run` is the engine; PyAV and Pillow do the media work."""
