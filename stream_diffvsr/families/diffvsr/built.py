"""The networks as graphs for runtimes other than PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import StreamDiffVSRError
from ...memory import is_out_of_memory
from ...runtimes.graph import Call, Graph, Runtime, Shapes
from ...tensors import MINIMUM_SIDE, SCALE, padded_size
from ...upscaler import OnStep, Placement
from .control import Control, Residuals
from .networks import Guidance, TorchCalls, TorchNetworks
from .plan import Plan
from .vae import TemporalAutoencoderTiny, TemporalBlock, reduce_like

EXAMPLE = (5, 7)
"""Sides of the example latents, divided by the U-Net's reduction factor; no other axis has these sizes."""

RANGE = 128
"""If a runtime must know the sizes in advance, graphs accept sides up to the next multiple of this."""


@dataclass(eq=False)
class BuiltNetworks:
    """The networks of a checkpoint, opened as graphs when they are first called.

    Flow is still computed in PyTorch, and so are bands of rows, which need a loop around the layers.
    """

    networks: TorchNetworks
    runtime: Runtime
    _open: dict[tuple[str, str, tuple[int, int] | None], Call] = field(default_factory=dict)
    _zeros: dict[tuple[int, ...], list[tuple[int, ...]]] = field(default_factory=dict)

    @contextmanager
    def calls(
        self,
        plan: Plan,
        own: torch.dtype,
        dtype: torch.dtype,
        placement: Placement,
        need: Callable[[str], int] = lambda stage: 0,
    ) -> Generator[TorchCalls, None, None]:
        """Yield calls as `TorchNetworks.calls` does; if `dtype` differs from `own`, they run in PyTorch."""
        if dtype != own:
            with self.networks.calls(plan, own, dtype, placement, need) as calls:
                yield calls
            return
        channels = self.networks.vae.latent_channels
        yield BuiltCalls(self.networks, plan, dtype, placement, need, latent_channels=channels, built=self)

    def run(self, name: str, inputs: Sequence[Tensor], size: tuple[int, int], form: str = "") -> list[Tensor]:
        """Run a graph for latents of `size` and return its outputs, in the runtime's number format."""
        call = self.opened(name, size, form)
        floats = (x.to(self.runtime.dtype) if x.is_floating_point() else x for x in inputs)
        return call(*floats)

    def is_open(self, name: str, size: tuple[int, int], form: str) -> bool:
        """Return whether a graph is ready to run."""
        return (name, form, self.area(size)) in self._open

    def area(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Return the largest latents (height, width) accepted by graphs for `size`; None means no limit."""
        return padded_size(*size, RANGE) if self.runtime.needs_profile else None

    def opened(self, name: str, size: tuple[int, int], form: str = "") -> Call:
        """Return a graph that is ready to run, converting it on first use.

        Raises `StreamDiffVSRError` if memory runs out.
        """
        area = self.area(size)
        if (name, form, area) not in self._open:
            try:
                # The exported networks outlive the caller's inference mode.
                with torch.inference_mode(False), torch.no_grad():
                    self._open[name, form, area] = self.runtime.open(self._graph(name, form, area))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise StreamDiffVSRError(
                    f"memory ran out while {self.runtime.name} was preparing {name!r} ({error}); close other "
                    "programs, or choose runtime torch"
                ) from error
        return self._open[name, form, area]

    def zeros(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> list[Tensor]:
        """Return the all-zero residuals for a frame without guidance."""
        size = (x.shape[-2], x.shape[-1])
        if size not in self._zeros:
            self._zeros[size] = [tuple(each.shape) for each in self._residuals(x, timestep, prompt)]
        return [x.new_zeros(shape) for shape in self._zeros[size]]

    def form(self, height: int, width: int) -> str:
        """Return a name for the sizes that share one built U-Net.

        Two sizes share a U-Net if their heights and their widths have the same remainders modulo `_multiple`,
        because these determine how its levels are enlarged.
        """
        multiple = self._multiple
        return f"{height % multiple}x{width % multiple} over {multiple}"

    @property
    def _multiple(self) -> int:
        return 2 ** (len(self.networks.unet.config["block_out_channels"]) - 1)  # type: ignore[index]

    def _residuals(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> list[Tensor]:
        """Return tensors without values, with the shapes of the ControlNet's residuals."""
        control = self.networks.controlnet
        with getattr(x, "fake_mode", None) or FakeTensorMode(allow_non_fake_inputs=True) as mode:
            large = x.new_empty((1, 3, SCALE * x.shape[-2], SCALE * x.shape[-1]))
            fake = [mode.from_tensor(each) for each in (x, timestep, prompt)]
            levels, middle = control(*fake, control.embed(large), 1.0)  # type: ignore[arg-type]
        return [*levels, middle]

    def _graph(self, name: str, form: str, area: tuple[int, int] | None) -> Graph:
        """Return a graph with example inputs that are as small as possible."""
        rest = [int(side) for side in form.partition(" ")[0].split("x")] if form else (0, 0)
        height, width = (self._multiple * n + r for n, r in zip(EXAMPLE, rest, strict=True))
        profile = None
        if area is not None:
            smallest = [r + self._multiple * max(0, -((r - MINIMUM_SIDE) // self._multiple)) for r in rest]
            largest = [side - (side - r) % self._multiple for side, r in zip(area, rest, strict=True)]
            profile = self._shapes(name, *smallest), self._shapes(name, *largest)
        unet, control, vae = self.networks.unet, self.networks.controlnet, self.networks.vae
        network = {
            "embed": lambda: control.embedding,
            "control": lambda: _Control(control),
            "unet": lambda: _UNet(unet),
            "features": lambda: _Features(vae),
        }.get(name, lambda: _Decode(vae))()
        return Graph(name, network, self._inputs(name, height, width), form, profile)

    def _shapes(self, name: str, height: int, width: int) -> Shapes:
        """Return the shapes of a graph's inputs for latents of this size, without computing anything."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            return tuple(tuple(x.shape) for x in self._inputs(name, height, width))

    def _inputs(self, name: str, height: int, width: int) -> tuple[Tensor, ...]:
        """Return inputs of a graph, filled with zeros, for latents of this size."""
        unet, control, vae = self.networks.unet, self.networks.controlnet, self.networks.vae
        like = next(unet.parameters())
        config: Any = unet.config  # type: ignore[union-attr]

        def empty(channels: int, scale: int = 1) -> Tensor:
            return like.new_zeros((1, channels, scale * height, scale * width))

        latents, large, x = empty(vae.latent_channels), empty(3, SCALE), empty(config["in_channels"])
        prompt = like.new_zeros((1, 77, config["cross_attention_dim"]))
        timestep = torch.zeros((), dtype=torch.int64, device=like.device)
        if name in ("embed", "features"):
            return (large,)
        if name == "control":
            return x, timestep, prompt, control.embed(large), like.new_ones(())
        if name == "unet":
            return x, timestep, prompt, *self.zeros(x, timestep, prompt)
        if name == "decode-first":
            return (latents,)
        trusts = [empty(1, scale) for scale in sorted(set(block_scales(vae)))]
        return latents, *trusts, *vae.features(large)


@dataclass(eq=False)
class BuiltCalls(TorchCalls):
    """`Networks` that run as graphs, used for one attempt at one frame."""

    built: BuiltNetworks = None  # type: ignore[assignment]

    def get_ready(self, size: tuple[int, int], guided: bool, on_step: OnStep) -> None:
        """Open the graphs for frames of this size before the first frame, since conversion takes minutes.

        If the U-Net runs in tiles, its graph is opened only when it is first called; bands run in PyTorch.
        """
        wanted = [] if self.plan.tile else [("unet", self.built.form(*padded_size(*size)))]
        wanted += [("control", "")] if guided else []
        if self.plan.rows is None:
            wanted += [("decode-first", "")]
            wanted += [(name, "") for name in ("embed", "features", "decode") if guided]
        latents = padded_size(*size)
        missing = [(name, form) for name, form in wanted if not self.built.is_open(name, latents, form)]
        for index, (name, form) in enumerate(missing, 1):
            if name in ("unet", "control", "embed"):
                self._enter("unet", "controlnet", "unet")
            else:
                self._enter("vae")
            self.built.opened(name, latents, form)
            on_step("build", index, len(missing))

    def embed(self, warped: Tensor) -> Tensor:
        if self.plan.rows is not None:
            return super().embed(warped)
        self._enter("unet", "controlnet", "unet")
        return self.built.run("embed", [warped], _latent_size(warped))[0]

    def _control(self, x: Tensor, timestep: Tensor, prompt: Tensor, guidance: Guidance) -> Residuals:
        scale = torch.tensor(guidance.scale)
        *levels, middle = self.built.run(
            "control", [x, timestep, prompt, guidance.embedding, scale], (x.shape[-2], x.shape[-1])
        )
        return levels, middle

    def _unet(self, x: Tensor, timestep: Tensor, prompt: Tensor, residuals: Residuals | None) -> Tensor:
        levels = self.built.zeros(x, timestep, prompt) if residuals is None else [*residuals[0], residuals[1]]
        size = x.shape[-2], x.shape[-1]
        return self.built.run("unet", [x, timestep, prompt, *levels], size, self.built.form(*size))[0]

    def features(self, warped: Tensor) -> list[Tensor]:
        if self.plan.rows is not None:
            return super().features(warped)
        self._kept.clear()
        self._enter("vae")
        return self.built.run("features", [warped], _latent_size(warped))

    def decode(self, latents: Tensor, features: list[Tensor] | None, trust: Tensor | None) -> Tensor:
        if self.plan.rows is not None:
            return super().decode(latents, features, trust)
        self._kept.clear()
        self._enter("vae")
        height, width = latents.shape[-2:]
        if features is None:
            return self.built.run("decode-first", [latents], (height, width))[0]
        trusts = []
        for scale in sorted(set(block_scales(self.networks.vae))):
            ones = latents.new_ones((1, 1, scale * height, scale * width))
            reduced = reduce_like(trust, ones)
            trusts.append(ones if reduced is None else reduced)
        return self.built.run("decode", [latents, *trusts, *features], (height, width))[0]


def _latent_size(large: Tensor) -> tuple[int, int]:
    return large.shape[-2] // SCALE, large.shape[-1] // SCALE


def block_scales(vae: TemporalAutoencoderTiny) -> list[int]:
    """Return the scale, relative to the latents, at which each block of the decoder works."""
    scales, scale = [], 1
    for layer in vae.decoder.layers:
        if isinstance(layer, TemporalBlock):
            scales.append(scale)
        scale *= 2 if isinstance(layer, nn.Upsample) else 1
    return scales


class _Control(nn.Module):
    """The ControlNet with its strength as a tensor, so that the strength can be an input of a graph."""

    def __init__(self, control: Control) -> None:
        super().__init__()
        self.control = control

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor, embedding: Tensor, scale: Tensor) -> Any:
        levels, middle = self.control(x, timestep, prompt, embedding, scale)  # type: ignore[arg-type]
        return (*levels, middle)


class _UNet(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor, *residuals: Tensor) -> Tensor:
        return self.unet(
            x,
            timestep,
            encoder_hidden_states=prompt,
            down_block_additional_residuals=residuals[:-1],
            mid_block_additional_residual=residuals[-1],
            return_dict=False,
        )[0]


class _Features(nn.Module):
    def __init__(self, vae: TemporalAutoencoderTiny) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, warped: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.vae.features(warped))


class _Decode(nn.Module):
    """The decoder, with inputs for trust that is already reduced to the sizes of its blocks."""

    def __init__(self, vae: TemporalAutoencoderTiny) -> None:
        super().__init__()
        self.vae, self.scales = vae, block_scales(vae)

    def forward(self, latents: Tensor, *others: Tensor) -> Tensor:
        sizes = sorted(set(self.scales))
        trusts = dict(zip(sizes, others, strict=False))
        features, scales = iter(others[len(sizes) :]), iter(self.scales)
        x = self.vae.bound(latents)
        for layer in self.vae.decoder.layers:
            if isinstance(layer, TemporalBlock):
                x = layer(x, next(features, None), trusts.get(next(scales)))
            else:
                x = layer(x)
        return x * 2 - 1
