"""The Upscale node over models that take chunks."""

from __future__ import annotations

import pytest
import torch
from family_cases import CASES
from node_pack import load_pack, part
from samples import moving

from stream_diffvsr import load_pipeline, to_pixels

PACK = load_pack()
UPSCALE = PACK.NODE_CLASS_MAPPINGS["StreamDiffVSR_Upscale"]
PROCESS = PACK.NODE_CLASS_MAPPINGS["StreamDiffVSR_ProcessFrame"]
SettingsValue = part(PACK, "nodes.settings").SettingsValue


@pytest.mark.parametrize("family", ["flashvsr", "swiftvr"])
def test_batches_linked_by_state_equal_one_run_but_for_the_flushed_tail(family, tmp_path):
    case = CASES[family]
    pipe = load_pipeline(case.make(tmp_path), device="cpu", **case.loading)
    settings = SettingsValue({"scale": 1.0}, family=family)
    first, chunk, ahead = pipe.info.first, pipe.info.chunk, {"flashvsr": 4, "swiftvr": 3}[family]
    count, split = first + chunk + 2, first + 2
    images = to_pixels(moving(count, 16, 16)).movedim(1, -1)
    whole, _ = UPSCALE().execute(pipe, images, settings=settings)
    assert whole.shape == (count, 16, 16, 3)
    one, state = UPSCALE().execute(pipe, images[:split], settings=settings)
    two, after = UPSCALE().execute(pipe, images[split:], state=state, settings=settings)
    assert (len(one), len(two), state.index, after.index) == (split, count - split, split, count)
    border = first - ahead
    assert torch.equal(one[:border], whole[:border])
    assert torch.equal(two, whole[split:])
    assert not torch.equal(one[border:], whole[border:split])
    with pytest.raises(ValueError, match="one frame at a time"):
        PROCESS().execute(pipe, images[:1], state)
