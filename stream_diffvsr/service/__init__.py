"""A web page and a REST API; each job runs the command `upscale` in a separate process."""
