"""The node that adds a LoRA to a model."""

# ruff: noqa: N802 (ComfyUI prescribes the names)
from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..stream_diffvsr.errors import IncompatibleInputError, ModelNotFoundError
from . import files, host
from .pipes import how_made, remember
from .sockets import ADVANCED, PIPE, PIPE_IN

if TYPE_CHECKING:
    from ..stream_diffvsr.upscaler import Upscaler


class LoRA:
    """Returns a new pipe with a LoRA added; the input pipe is not changed."""

    DESCRIPTION = (
        "Adds a LoRA made by 'stream-diffvsr train' to a Stream-DiffVSR model. Chain several of these nodes "
        "to combine LoRAs. The input model stays unchanged, so you can use both side by side."
    )
    SEARCH_ALIASES: ClassVar = ["stream diffvsr lora", "fine-tuned video upscale", "load lora"]
    CATEGORY = ADVANCED
    FUNCTION = "execute"
    RETURN_TYPES = (PIPE,)
    RETURN_NAMES = ("pipe",)
    OUTPUT_TOOLTIPS = ("The model with the LoRA, for the pipe input of the other nodes.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "pipe": PIPE_IN,
                "lora": (
                    [name for name, path in host.lora_files() if is_ours(path, files.file_stamp(path))],
                    {
                        "tooltip": "The list shows the files in ComfyUI's LoRA folders that were made by "
                        "'stream-diffvsr train'. LoRAs for other models do not work and are not listed."
                    },
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -2.0,
                        "max": 2.0,
                        "step": 0.05,
                        "tooltip": "How strongly to apply the LoRA: 1 applies it as trained, and 0 turns it "
                        "off.",
                    },
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora: str, **_: Any) -> str:
        path = dict(host.lora_files()).get(lora)
        return "missing" if path is None else files.file_stamp(path)

    def execute(self, pipe: Upscaler, lora: str, strength: float) -> tuple[Upscaler]:
        from ..stream_diffvsr.families.diffvsr.pipeline import StreamDiffVSRPipeline

        if not isinstance(pipe, StreamDiffVSRPipeline):
            raise IncompatibleInputError(f"a LoRA needs a Stream-DiffVSR model, not {pipe.info.family}")
        path = dict(host.lora_files()).get(lora)
        if path is None:
            raise ModelNotFoundError(f"LoRA {lora!r}", lora, "Put it in ComfyUI's models/loras folder.")
        made = pipe.with_loras((path, strength))
        host.manage(made, pipe.device)
        about = how_made(pipe)
        loras = [*about.model.get("loras", ()), [str(path), strength]]
        remember(made, replace(about, base=None, model={**about.model, "loras": loras}))
        return (made,)


@lru_cache(maxsize=4096)
def is_ours(path: Path, files_identity: str) -> bool:
    """Whether a LoRA file was made for Stream-DiffVSR; it is read again only when it changes."""
    from ..stream_diffvsr.families.diffvsr.lora import is_lora

    return is_lora(path)
