"""Single-image models of spandrel's architectures, frame by frame; steadied over time on request."""
