"""Fixtures: real tiny networks, the recorded reference data, and frames to feed them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch

from stream_diffvsr import StreamDiffVSRPipeline, load_pipeline
from stream_diffvsr.tensors import upsample

hypothesis.settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("project")

GOLDEN = Path(os.environ.get("STREAM_DIFFVSR_GOLDEN", Path(__file__).parent / "golden"))
"""The trimmed copy, or a folder with all that was recorded."""


@pytest.fixture(autouse=True)
def _random_state():
    """Each test finds and leaves torch's random numbers as they were."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A writable copy of the tiny random checkpoint; read it, do not change it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    shutil.copytree(GOLDEN / "checkpoint", folder, copy_function=shutil.copyfile)
    return folder


@pytest.fixture(scope="session")
def pipe(checkpoint: Path) -> StreamDiffVSRPipeline:
    """The tiny checkpoint without flow estimation: guided only where a test gives flow."""
    return load_pipeline(checkpoint, device="cpu", flow="none")


def shift_flow(current: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """A cheap flow that depends on both frames, so that mixing them up is seen."""
    difference = (current - previous).mean(1, keepdim=True)
    return torch.cat([2 * difference + 1, -difference], dim=1)


@pytest.fixture(scope="session")
def guided(checkpoint: Path) -> StreamDiffVSRPipeline:
    """The tiny checkpoint with a cheap flow, so that every frame after the first is guided."""
    return load_pipeline(checkpoint, device="cpu", flow=shift_flow)


def moving(count: int, height: int = 12, width: int = 16, seed: int = 0) -> torch.Tensor:
    """A smooth random pattern that drifts, (N, 3, h, w) float32 in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 3, height // 4 + 4, width // 4 + count + 4), generator=generator) * 2 - 1
    wide = upsample(coarse).clamp(-1, 1)
    return torch.cat([wide[..., :height, 2 * i : 2 * i + width] for i in range(count)])
