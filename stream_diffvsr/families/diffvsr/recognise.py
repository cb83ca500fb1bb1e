"""Other models' weights in this model's place, told by their keys and shapes, never by file names."""

from __future__ import annotations

from ...weights.networks import Shapes
from .parts import TEXT_ENCODER, Part

LATENT, LATENT_AND_LQ, LATENT_AND_MASK = 4, 7, 9
"""Input channels of U-Nets: generation; generation on top of a picture, as here; inpainting."""

FAMILIES = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
"""By the width of the prompt embedding that the attention layers take."""

SINGLE_FILE = ("model.diffusion_model.", "control_model.", "first_stage_model.")


def name_foreign(part: Part) -> str:
    """What another model's weights are, in words; empty where they may be this model's."""
    shapes = part.shapes
    if any(key.startswith(SINGLE_FILE) for key in shapes):
        return "a Stable Diffusion checkpoint in single-file layout"
    if part.name == "vae":
        return _autoencoder(shapes)
    return "" if part.name == TEXT_ENCODER else _diffusion(part, shapes)


def _diffusion(part: Part, shapes: Shapes) -> str:
    """U-Net or ControlNet."""
    classes = shapes.get("class_embedding.weight")
    if classes or part.config.get("num_class_embeds"):
        count = classes[0] if classes else part.config["num_class_embeds"]
        return f"the {part.name} of a plain Stable Diffusion x4 upscaler (num_class_embeds {count})"
    first = shapes.get("conv_in.weight", (0, LATENT_AND_LQ))
    channels = first[1] if len(first) > 1 else LATENT_AND_LQ
    if channels not in (LATENT, LATENT_AND_MASK):
        return _swapped(part, shapes)
    family = FAMILIES.get(_prompt_width(shapes), "another diffusion model")
    kind = "ControlNet" if _is_controlnet(shapes) else "inpainting U-Net" if channels > LATENT else "U-Net"
    return f"a {family} {kind}"


def _swapped(part: Part, shapes: Shapes) -> str:
    if _is_controlnet(shapes) != (part.name == "controlnet") and "conv_in.weight" in shapes:
        return "a ControlNet" if part.name == "unet" else "a U-Net"
    return ""


def _is_controlnet(shapes: Shapes) -> bool:
    return "controlnet_cond_embedding.conv_in.weight" in shapes


def _prompt_width(shapes: Shapes) -> int:
    return next((shape[-1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), 0)


def _autoencoder(shapes: Shapes) -> str:
    if "decoder.conv_in.weight" in shapes:
        return "the autoencoder of a plain Stable Diffusion (AutoencoderKL)"
    if "decoder.layers.0.weight" in shapes and not any(".temporal_processor." in key for key in shapes):
        return "a tiny autoencoder without the Temporal Processor Module"
    return ""
