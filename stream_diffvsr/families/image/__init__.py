"""Single-image models that spandrel supports, run frame by frame and optionally stabilised over time."""
