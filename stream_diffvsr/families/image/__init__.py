"""Single-image models of spandrel's architectures, run frame by frame and optionally steadied over time."""
