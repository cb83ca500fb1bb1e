"""The command `stream-diffvsr`: each subcommand is a module with `add_arguments` and `run`."""
