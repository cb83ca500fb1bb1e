"""ComfyUI nodes for the engine: thin adapters, one module per topic.

host        the only module that talks to ComfyUI
sockets     socket types, and widgets shared by several nodes
pipes       records of how each pipe was made
layout      converts IMAGE tensors to model range and back
sizes       sizes and presets shared by several nodes
job         upscales one file to another
temporary   writes in-memory videos to files, for job to read
load, lora, runtime, upscale, video, simple, live, state, settings, example        the nodes
"""

from ..stream_diffvsr import errors
from .example import ExampleVideo
from .live import Live
from .load import Loader
from .lora import LoRA
from .runtime import Runtime
from .settings import FlashVSRSettings, ImageSettings, Settings, SwiftVRSettings
from .simple import SimpleUpscale
from .state import CreateState, ExtractState, LoadState, SaveState
from .upscale import ProcessFrame, Upscale
from .video import UpscaleVideo

# ComfyUI's page shows an error with its module name, which would otherwise be this folder's path.
for _error in vars(errors).values():
    if isinstance(_error, type) and issubclass(_error, errors.StreamDiffVSRError):
        _error.__module__ = "stream_diffvsr"

NODES = {
    "Loader": (Loader, "Loader"),
    "Upscale": (Upscale, "Upscale"),
    "UpscaleVideo": (UpscaleVideo, "Upscale Video"),
    "ProcessFrame": (ProcessFrame, "Process Frame"),
    "CreateState": (CreateState, "Create State"),
    "ExtractState": (ExtractState, "Extract State"),
    "SaveState": (SaveState, "Save State"),
    "LoadState": (LoadState, "Load State"),
    "Settings": (Settings, "Settings"),
    "FlashVSRSettings": (FlashVSRSettings, "FlashVSR Settings"),
    "SwiftVRSettings": (SwiftVRSettings, "SwiftVR Settings"),
    "ImageSettings": (ImageSettings, "Image Model Settings"),
    "SimpleUpscale": (SimpleUpscale, "Simple Video Upscale"),
    "Live": (Live, "Live Upscale"),
    "LoRA": (LoRA, "LoRA"),
    "Runtime": (Runtime, "Runtime"),
    "ExampleVideo": (ExampleVideo, "Example Video"),
}

NODE_CLASS_MAPPINGS = {f"StreamDiffVSR_{name}": node for name, (node, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {
    f"StreamDiffVSR_{name}": f"Stream-DiffVSR {title}" for name, (_, title) in NODES.items()
}
