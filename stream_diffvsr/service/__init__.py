"""A web page and a REST API; each job runs the `upscale` command in a separate process."""
