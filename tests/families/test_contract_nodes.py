"""The Upscale node over models that take chunks."""

from __future__ import annotations

from types import SimpleNamespace

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


class Manager(SimpleNamespace):
    """What VideoHelperSuite's batch manager shows to other nodes."""

    __hash__ = object.__hash__


def batched(pipe, images, size: int, linked: bool = True, **more) -> list[torch.Tensor]:
    """The parts that a meta-batch makes of images, each with alpha."""
    node, manager, parts = UPSCALE(), Manager(has_closed_inputs=False), []
    for number, batch in enumerate(images.split(size)):
        manager.has_closed_inputs = number == (len(images) - 1) // size
        prompt = {
            "1": {"class_type": "VHS_BatchManager", "inputs": {"requeue": number}},
            "4": {"class_type": "StreamDiffVSR_Upscale", "inputs": {"meta_batch": ["1", 0]}},
        }
        link = manager if linked else None
        result, _ = node.execute(pipe, batch, meta_batch=link, unique_id="4", prompt=prompt, **more)
        parts.append(result)
    assert not part(PACK, "nodes.upscale")._sequences.get(manager)
    return parts


@pytest.mark.parametrize("family", ["flashvsr", "swiftvr"])
def test_a_meta_batch_equals_one_run(family, tmp_path):
    case = CASES[family]
    pipe = load_pipeline(case.make(tmp_path), device="cpu", **case.loading)
    more = {"settings": SettingsValue({"scale": 1.0}, family=family), "strength": 0.5}
    first, chunk = pipe.info.first, pipe.info.chunk
    images = to_pixels(moving(2 * first + 3, 16, 16)).movedim(1, -1)
    images = torch.cat(
        [images, torch.linspace(0, 1, len(images))[:, None, None, None].expand(-1, 16, 16, 1)], -1
    )
    whole, _ = UPSCALE().execute(pipe, images, **more)
    for size in (first, first + 1, len(images)):
        parts = batched(pipe, images, size, **more)
        assert all(len(each) for each in parts)
        assert torch.equal(torch.cat(parts), whole)
    assert chunk > 1 and len(batched(pipe, images, first, **more)[0]) < first
    with pytest.raises(ValueError, match=f"frames_per_batch of at least {first}"):
        batched(pipe, images, first - 1, **more)
    with pytest.raises(ValueError, match="to be linked to meta_batch"):
        batched(pipe, images, first, linked=False, **more)
