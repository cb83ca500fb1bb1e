"""ComfyUI-Stream-DiffVSR: the entry point that ComfyUI imports when it loads the node pack."""

# Test runners import this file on its own, outside a package; then there is nothing to register.
if __package__:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .stream_diffvsr import __version__

    WEB_DIRECTORY = "./web"

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "__version__"]
