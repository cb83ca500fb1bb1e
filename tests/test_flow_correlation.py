"""Correlations looked up in linear memory are those of torchvision's volume of all pairs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.optical_flow import raft_large, raft_small
from torchvision.models.optical_flow.raft import CorrBlock

from stream_diffvsr.flow import RaftFlow
from stream_diffvsr.flow.correlation import BLOCK, LinearCorrelation, block_order

CHANNELS, LEVELS = 12, 4


def both(places: torch.Tensor, radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same lookup in the volume and in linear memory."""
    features = torch.randn(2, 1, CHANNELS, *places.shape[-2:])
    found = []
    for block in (CorrBlock(num_levels=LEVELS, radius=radius), LinearCorrelation(LEVELS, radius)):
        block.build_pyramid(*features)
        found.append(block.index_pyramid(centroids_coords=places))
    return found[0], found[1]


def grid(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y])[None].float()


@settings(max_examples=15)
@given(
    st.integers(16, 34),
    st.integers(16, 34),
    st.sampled_from([3, 4]),
    st.sampled_from([0.0, 0.3, 2.0, 9.0, 60.0, 1e6]),
    st.integers(0, 2**31),
)
def test_lookup_equals_the_volume(height, width, radius, spread, seed):
    """From smooth places, where squares share windows, to places all over and outside the picture."""
    torch.manual_seed(seed)
    places = grid(height, width) + spread * torch.randn(1, 2, height, width)
    volume, linear = both(places, radius)
    assert (volume - linear).abs().max() < 2e-3 * max(1, min(spread, 60) / 10)


def test_lookup_at_whole_positions_is_exact_at_the_border():
    volume, linear = both(grid(17, 23) - 5, 4)
    torch.testing.assert_close(linear, volume, atol=2e-5, rtol=0)


@given(st.integers(1, 50), st.integers(1, 50))
def test_block_order_keeps_squares_together(height, width):
    order, place = block_order(height, width, torch.device("cpu"))
    assert torch.equal(order[place], torch.arange(height * width))
    rows, columns = order.view(-1, BLOCK**2) // width, order.view(-1, BLOCK**2) % width
    assert (rows.amax(1) - rows.amin(1)).max() < BLOCK and (columns.amax(1) - columns.amin(1)).max() < BLOCK


@pytest.fixture(scope="module", params=[raft_large, raft_small], ids=lambda build: build.__name__)
def network(request):
    torch.manual_seed(1)
    return request.param(weights=None).eval()


@torch.no_grad()
@pytest.mark.parametrize("method", ["whole", "linear"])
def test_flow_equals_torchvisions_own(network, method):
    current, previous = torch.rand(2, 1, 3, 128, 160) * 2 - 1
    expected = network(current, previous)[-1]
    got = RaftFlow(network, "raft").estimate(current, previous, method)
    assert expected.abs().max() > 1
    assert (got - expected).abs().max() < 1e-3


@torch.no_grad()
def test_nothing_of_a_frame_stays_in_the_network(network):
    before = network.corr_block.corr_pyramid
    RaftFlow(network, "raft").estimate(*torch.rand(2, 1, 3, 128, 128), "whole")
    assert network.corr_block.corr_pyramid is before


@pytest.mark.long
@torch.no_grad()
def test_flow_at_720p_equals_torchvisions_own(network):
    current, previous = torch.rand(2, 1, 3, 720, 1280) * 2 - 1
    expected = network(current, previous)[-1]
    assert (RaftFlow(network, "raft").estimate(current, previous, "linear") - expected).abs().max() < 1e-3


PEAK = """
import json, resource, sys, torch
from torchvision.models import optical_flow
from stream_diffvsr.flow import RaftFlow, raft
from stream_diffvsr.flow.correlation import LinearCorrelation

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
{body}
print(json.dumps([list(result.shape), peak() - before]))
"""

FLOW = """
raft.UPDATES = {updates}
frame = torch.rand(1, 3, {height} // 40, {width} // 40)
frame = torch.nn.functional.interpolate(frame, size=({height}, {width}))
flow = RaftFlow(getattr(optical_flow, "{name}")(weights=None), "raft")
before = peak()
with torch.no_grad():
    result = flow.estimate(frame, frame.roll(8, 3), "linear")
"""

LOOKUP = """
features = torch.randn(2, 1, 256, {height}, {width})
y, x = torch.meshgrid(torch.arange({height}), torch.arange({width}), indexing="ij")
places = torch.stack([x, y])[None].float()
before = peak()
block = LinearCorrelation(4, 4)
block.build_pyramid(*features)
block.index_pyramid(centroids_coords=places + torch.randn_like(places) / 4)
scattered = 40 * torch.randn_like(places) * (y < {height} // 8)
result = block.index_pyramid(centroids_coords=places + scattered)
"""


def peak_of(body: str, shape: list[int]) -> int:
    """Bytes above the state before, in a process of its own."""
    pytest.importorskip("resource")
    program = PEAK.format(body=body)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    got, peak = json.loads(result.stdout)
    assert got == shape
    return peak


def flow_peak(name: str, height: int, width: int, updates: int) -> int:
    body = FLOW.format(name=name, height=height, width=width, updates=updates)
    return peak_of(body, [1, 2, height, width])


@pytest.mark.long
def test_1440p_flow_stays_small():
    """The volume alone would be 16.4 GiB; every update needs the same memory, so one is enough here."""
    assert flow_peak("raft_small", 1440, 2560, updates=1) < 3 * 10**9


@pytest.mark.long
def test_1440p_lookup_at_the_width_of_large_raft_stays_small():
    """Smooth places share windows, scattered ones have one each: neither holds more than a batch at once."""
    height, width = 1440 // 8, 2560 // 8
    assert peak_of(LOOKUP.format(height=height, width=width), [1, 4 * 81, height, width]) < 10**9


@pytest.mark.long
@pytest.mark.parametrize(("size", "limit"), [((1440, 2560), 3 * 10**9), ((2160, 3840), 7 * 10**9)])
def test_large_raft_stays_small(size, limit):
    assert flow_peak("raft_large", *size, updates=12) < limit
