"""A page and a REST API; each job is the command `upscale` in a process of its own."""
