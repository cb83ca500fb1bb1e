"""Count the bytes that a frame needs by running its networks on the meta device, which computes nothing.

The counts include only memory in use. glibc also keeps freed memory in gaps between blocks in use; the amount
differs from run to run, so a process on a CPU may occupy up to twice as much. `plan.py` allows for this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...flow.estimators import TILE as FLOW_TILE
from ...memory import count_bytes, on_meta
from ...runtimes.torch import folded, packed
from ...tensors import SCALE, padded_size
from ...upscaler import FixedPlacement, ignore_progress
from .denoise import Schedule, denoise, latent_tiles
from .networks import Guidance, TorchCalls, TorchNetworks
from .options import UpscaleOptions
from .plan import Plan

META = torch.device("meta")

FRAMES = 3
"""Number of output-sized pictures outside the networks: previous hq, warped hq and the caller's picture."""

LIBRARIES = 85 * 2**20
"""Bytes that the libraries allocate on their first computation, for code, threads and workspaces."""

ONE_STEP = UpscaleOptions(num_inference_steps=1)


class Needs:
    """Counts the bytes that each stage of one checkpoint needs, once per frame size."""

    def __init__(
        self,
        networks: TorchNetworks,
        scheduler_config: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Prepare to count for networks that will run on `device`; they may be on the meta device now."""
        self.networks, self.scheduler_config = networks, scheduler_config
        self.dtype, self.device = dtype, device
        self._counted: dict[tuple[object, ...], int] = {}

    def __call__(self, size: Sequence[int], options: UpscaleOptions, plan: Plan) -> dict[str, int]:
        """Return the bytes by stage for an LQ size (height, width).

        The keys are 'weights' (including existing converted copies) and 'frames'; 'flow', 'controlnet'
        (embedding the warped frame), 'unet' (together with the ControlNet) and 'vae' for the activations of
        these stages; and 'peak' for the total at the worst moment.
        """
        height, width = padded_size(*size)
        scale = options.flow_scale
        stages = {
            "flow": self._once(("flow", height, width, scale, plan.flow), self._flow),
            "controlnet": self._once(("controlnet", height, width, plan.rows), self._embedding),
            "unet": self._once(("unet", height, width, plan.tile, plan.overlap), self._denoising),
            "vae": self._once(("vae", height, width, plan.rows), self._decoding),
        }
        weights = sum(
            weight.nbytes for network in self.networks.stages().values() for weight in network.parameters()
        )
        have, to_come = self._beside_weights()
        beside, weights = self._beside(height, width), weights + have
        peak = weights + to_come + beside + max(stages.values())
        return {"weights": weights, "frames": beside - LIBRARIES, **stages, "peak": peak}

    def _beside(self, height: int, width: int) -> int:
        return LIBRARIES + FRAMES * 3 * torch.float32.itemsize * SCALE**2 * height * width

    def _beside_weights(self) -> tuple[int, int]:
        """Return the bytes of converted weights that already exist, and of those that the next frame adds."""
        networks = self.networks.stages().values() if self.device.type == "cpu" else ()
        each = packed.bytes_beside(networks), folded.bytes_beside(networks)
        return each[0][0] + each[1][0], each[0][1] + each[1][1]

    def most(self, size: Sequence[int]) -> int:
        """Return, without counting, an upper bound on the bytes that a frame needs besides the weights.

        At any time, the networks hold at most a few dozen pictures (20 with the released widths), each with
        as many channels as the widest layer. RAFT's correlation volume needs a
        third of a byte per pair of LQ pixels.
        """
        height, width = padded_size(*size)
        networks = self.networks.stages().values()
        widest = max((max(x.shape, default=1) for net in networks for x in net.parameters()), default=1)
        _, to_come = self._beside_weights()
        work = max(400 * widest * height * width, (height * width) ** 2)
        return self._beside(height, width) + to_come + work

    def _once(self, key: tuple[object, ...], count: Callable[..., int]) -> int:
        if key not in self._counted:
            self._counted[key] = count(*key[1:])
        return self._counted[key]

    @cached_property
    def _meta(self) -> TorchNetworks:
        own = self.networks
        flow = on_meta(own.flow) if own.flow.countable else own.flow
        return TorchNetworks(flow, on_meta(own.unet), on_meta(own.controlnet), on_meta(own.vae))

    @cached_property
    def _weights(self) -> list[Tensor]:
        networks = self._meta.stages().values()
        own = [x for network in networks for x in chain(network.parameters(), network.buffers())]
        return [*own, *(folded.summed_weights(networks) if self.device.type == "cpu" else ())]

    def _peak(self, call: Callable[[], object], known: Iterable[Tensor]) -> int:
        """Count the bytes that a call would need on the real device besides the weights and `known`."""
        on_cpu = self._meta.stages().values() if self.device.type == "cpu" else ()
        known = [*self._weights, *known]  # before the context, in which layers do not look foldable
        with folded.folded(on_cpu):
            return count_bytes(call, known)

    def _calls(self, plan: Plan) -> TorchCalls:
        return TorchCalls(self._meta, plan, self.dtype, FixedPlacement(META), lambda stage: 0)

    def _flow(self, height: int, width: int, scale: float, method: str) -> int:
        result = 2 * torch.float32.itemsize * height * width * SCALE**2
        if method == "tiled":  # one tile at a time, besides the flow of the whole frame
            side = max(round(FLOW_TILE / (SCALE * scale)), 1)
            height, width = min(height, side), min(width, side)
        estimator = self._meta.flow
        if not estimator.estimates:
            return 0
        if method not in estimator.countable:
            return round(estimator.bytes_per_pixel * height * width * (SCALE * scale) ** 2) + result
        frames = [torch.empty(1, 3, height, width, device=META) for _ in range(2)]
        calls = self._calls(Plan(flow=method))
        return self._peak(lambda: calls.flow(frames[0], frames[1], scale), frames) + result

    def _embedding(self, height: int, width: int, rows: int | None) -> int:
        warped = torch.empty(1, 3, SCALE * height, SCALE * width, device=META)
        return self._peak(lambda: self._calls(Plan(rows=rows)).embed(warped), [warped])

    def _denoising(self, height: int, width: int, tile: int | None, overlap: int) -> int:
        config: Any = self._meta.unet.config
        channels = self._meta.vae.latent_channels
        shapes = [(1, 3, SCALE * height, SCALE * width), (1, channels, height, width), (1, 3, height, width)]
        warped, latents, lq = (torch.empty(shape, device=META) for shape in shapes)
        prompt = torch.empty(1, 77, config["cross_attention_dim"], device=META)
        schedule = Schedule.prepare(self.scheduler_config, 1, None, torch.device("cpu"))
        calls = self._calls(Plan())

        with torch.no_grad():
            embedding = calls.embed(warped)

        def one_step() -> Tensor:
            return denoise(
                calls,
                latents,
                lq,
                Guidance(embedding.clone()),  # kept during the call
                prompts=[prompt],
                schedule=schedule,
                options=ONE_STEP,
                tiles=latent_tiles(height, width, tile, overlap)[:1],
                on_step=ignore_progress,
            )

        return self._peak(one_step, [warped, latents, lq, prompt, embedding])

    def _decoding(self, height: int, width: int, rows: int | None) -> int:
        channels = self._meta.vae.latent_channels
        warped = torch.empty(1, 3, SCALE * height, SCALE * width, device=META)
        latents = torch.empty(1, channels, height, width, device=META)
        calls = self._calls(Plan(rows=rows))
        trust = torch.empty(1, 1, SCALE * height, SCALE * width, device=META)
        known = [warped, latents, trust]
        return self._peak(lambda: calls.decode(latents, calls.features(warped), trust), known)
