"""The node that selects the runtime, precision and devices of a model."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

import copy
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from ..stream_diffvsr.errors import IncompatibleInputError
from . import host
from .load import shared_pipe
from .pipes import how_made, remember
from .sockets import ADVANCED, PIPE, PIPE_IN, Widget, check_values

if TYPE_CHECKING:
    from ..stream_diffvsr.jobs.cluster import Devices
    from ..stream_diffvsr.upscaler import Upscaler

OWN = {"runtime": "torch", "provider": "auto", "compile_mode": "off", "quantize": "none"}
"""The values that every model supports; only Stream-DiffVSR models support others."""


class Runtime:
    """Returns a new pipe with the chosen runtime; the input pipe is not changed."""

    DESCRIPTION = (
        "Chooses how a model runs: with PyTorch, OpenVINO or ONNX Runtime, compiled, in 8 bits, or on "
        "several devices at once. Put this node last, as it overrides Settings and any earlier Runtime node."
    )
    SEARCH_ALIASES: ClassVar = [
        "openvino",
        "onnx",
        "tensorrt",
        "torch compile video upscale",
        "several gpus",
        "quantize int8 fp8",
    ]
    CATEGORY = ADVANCED
    FUNCTION = "execute"
    RETURN_TYPES = (PIPE,)
    RETURN_NAMES = ("pipe",)
    OUTPUT_TOOLTIPS = ("The model with these settings, for the pipe input of the other nodes.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        devices = (
            "Devices among which Upscale Video distributes a video's scenes: all, or a list such as "
            "cuda:0,cuda:1, or cpu:2 for two workers on the CPU. This needs the ray package and has "
            "not yet been tested on GPUs. Leave empty to use only the Loader's device."
        )
        return {
            "required": {"pipe": PIPE_IN, **choice_widgets()},
            "optional": {"devices": ("STRING", {"default": "", "advanced": True, "tooltip": devices})},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        runtime: str | None = None,
        provider: str | None = None,
        compile_mode: str | None = None,
        quantize: str | None = None,
        devices: str | None = None,
    ) -> bool:
        """Raise the errors that a run would raise; a value of None means that the input is linked."""
        given = {"runtime": runtime, "provider": provider, "compile_mode": compile_mode, "quantize": quantize}
        check_values(choice_widgets(), given)
        workers_on(devices or "")
        return True

    def execute(
        self,
        pipe: Upscaler,
        runtime: str = "torch",
        provider: str = "auto",
        compile_mode: str = "off",
        quantize: str = "none",
        devices: str = "",
    ) -> tuple[Upscaler]:
        asked = {"runtime": runtime, "provider": provider, "compile_mode": compile_mode, "quantize": quantize}
        check_has(pipe, asked)
        if workers_on(devices) and find_spec("ray") is None:
            raise ModuleNotFoundError(
                'setting devices requires the ray package: run python -m pip install "ray" with ComfyUI\'s '
                "Python, then restart ComfyUI; or leave devices empty"
            )
        base = how_made(pipe).base or pipe
        about = how_made(base)
        if quantize != "none" and "loras" in about.model:
            raise IncompatibleInputError(
                f"a model with a LoRA cannot run in 8 bits: set quantize to none, not {quantize}"
            )
        made = with_runtime(base, runtime, provider, quantize)
        model = {**about.model, "runtime": runtime, "provider": provider, "quantize": quantize}
        remember(made, replace(about, model=model, base=base, compile_mode=compile_mode, devices=devices))
        return (made,)


def choice_widgets() -> dict[str, Widget]:
    """Return the widgets that offer a list of choices; their order never changes."""
    from ..stream_diffvsr.families.diffvsr.options import UpscaleOptions
    from ..stream_diffvsr.options import widgets
    from ..stream_diffvsr.runtimes.choose import PROVIDERS, RUNTIMES
    from ..stream_diffvsr.runtimes.torch.quantized import QUANTIZATIONS

    kind, about = widgets(UpscaleOptions, ["compile_mode"])["compile_mode"]
    return {
        "runtime": (
            list(RUNTIMES),
            {
                "default": "torch",
                "tooltip": "The library that runs Stream-DiffVSR's networks. openvino and onnx are often "
                "faster on a CPU and produce the same results up to rounding; each needs its own Python "
                "packages and converts the model once. auto: the fastest installed library, found by "
                "timing a few small frames.",
            },
        ),
        "provider": (
            list(PROVIDERS),
            {
                "default": "auto",
                "tooltip": "The hardware that the runtime uses. openvino: cpu, or Intel's gpu or npu. onnx: "
                "cpu, cuda or tensorrt. auto: the Loader's device. With torch, leave this at auto.",
            },
        ),
        "compile_mode": (
            kind,
            {**about, "advanced": False, "tooltip": f"{about['tooltip']} Applies only to torch."},
        ),
        "quantize": (
            list(QUANTIZATIONS),
            {
                "default": "none",
                "tooltip": "int8 and fp8 run linear layers in 8-bit precision, which is an approximation. "
                "Both need the Python package torchao; fp8 also needs an NVIDIA 40-series card or newer. "
                "Applies only to torch.",
            },
        ),
    }


def check_has(pipe: Upscaler, asked: dict[str, str]) -> None:
    """Reject values that the model's family does not support."""
    from ..stream_diffvsr.load import FAMILIES

    for name, value in asked.items():
        if pipe.info.family != "diffvsr" and value != OWN[name]:
            title = FAMILIES[pipe.info.family].title
            raise IncompatibleInputError(f"{title} only supports {name} {OWN[name]}, not {value}")


def workers_on(devices: str) -> Devices | None:
    """Return the requested workers, or None if the Loader's device does the work.

    Raise `IncompatibleInputError` if `devices` names a single device, which must be chosen in the Loader.
    """
    from ..stream_diffvsr.jobs.cluster import parse_devices

    text = devices.strip()
    found = parse_devices(text) if text else None
    if found and len(found.names) > 1:
        return found
    if found and text != "all":
        raise IncompatibleInputError(
            f"devices must name more than one device, not {devices}; choose a single one in the Loader"
        )
    return None


def with_runtime(pipe: Upscaler, runtime: str, provider: str, quantize: str) -> Upscaler:
    """Return a copy of `pipe` with the given runtime; both share weights unless the copy runs in 8 bits."""
    from ..stream_diffvsr.families.diffvsr.fastest import with_runtime
    from ..stream_diffvsr.families.diffvsr.pipeline import StreamDiffVSRPipeline
    from ..stream_diffvsr.runtimes.choose import open_runtime

    made = pipe
    if isinstance(pipe, StreamDiffVSRPipeline):
        with host.install_line():
            # Check the runtime before loading a model, which takes a long time.
            open_runtime(runtime, provider, pipe.device, pipe.dtype, quantize)
            if quantize != "none":
                about = how_made(pipe)
                pipe = shared_pipe(about.source, pipe.device, pipe.dtype, about.model["flow"], quantize)
                assert isinstance(pipe, StreamDiffVSRPipeline)
            made = with_runtime(pipe, runtime, provider, pipe.dtype, quantize)
    return copy.copy(pipe) if made is pipe else made
