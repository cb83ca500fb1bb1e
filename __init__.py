"""ComfyUI-Stream-DiffVSR: what ComfyUI reads when it loads the pack."""

# Test runners import this file by itself, as a folder that is no package; then there is nothing to register.
if __package__:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .stream_diffvsr import __version__

    WEB_DIRECTORY = "./web"

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "__version__"]
