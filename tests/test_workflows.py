"""The example workflows against the nodes' schemas, positions of widget values included."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from comfy_examples import TABLE
from node_clips import frames_of
from node_pack import ROOT, load_pack

from stream_diffvsr.jobs.scenes import THRESHOLD, difference, hsv

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
NODES = load_pack().NODE_CLASS_MAPPINGS
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN")
FREE = {"state_file"}
"""Lists whose entries depend on the user's files."""


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def our_nodes(path: Path) -> list[dict]:
    return [node for node in read(path)["nodes"] if node["type"].startswith("StreamDiffVSR")]


def inputs_of(name: str) -> dict:
    groups = NODES[name].INPUT_TYPES()
    return {**groups.get("required", {}), **groups.get("optional", {})}


def widgets_of(name: str) -> list[tuple[str, object, dict]]:
    """(name, kind, options) of each widget in the order in which the page saves their values."""
    widgets = []
    for widget, (kind, options) in inputs_of(name).items():
        if isinstance(kind, list) or kind in WIDGET_TYPES:
            widgets.append((widget, kind, options))
            if "control_after_generate" in options:
                widgets.append(("control_after_generate", ["fixed"], {}))
    return widgets


def fits(value: object, kind: object, options: dict) -> bool:
    if isinstance(kind, list):
        return value in kind
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    right = isinstance(value, types[kind]) and (kind == "BOOLEAN" or not isinstance(value, bool))  # type: ignore[index]
    return right and options.get("min", value) <= value <= options.get("max", value)  # type: ignore[operator]


def test_there_is_one_for_each_way_of_working() -> None:
    names = (
        "before_after flashvsr frame_loop_with_state image_model_steady live_webcam long_video_file "
        "loop_with_state resume_state save_state several_devices simple_upscale simple_upscale.app "
        "simple_video single_image swiftvr upscale_and_interpolate vhs_meta_batch vhs_video_with_audio"
    )
    assert sorted(path.stem for path in WORKFLOWS) == sorted(names.split())


def test_they_are_what_their_table_says() -> None:
    """Nodes, what is set and what is linked; the page adds the rest (`comfy_examples`)."""
    for name, example in TABLE.items():
        workflow = read(ROOT / "example_workflows" / f"{name}.json")
        kinds = [node.kind for column in example.columns for node in column if node.kind]
        assert [node["type"] for node in workflow["nodes"]] == [*kinds, "MarkdownNote"], name
        assert workflow["nodes"][-1]["widgets_values"] == [example.note], name
        links = sum(len(node.links) for column in example.columns for node in column)
        assert len(workflow["links"]) == links, name
    assert len({read(path)["id"] for path in WORKFLOWS}) == len(WORKFLOWS)  # by which Live tells them apart


def test_the_clip_is_small_and_has_two_scenes() -> None:
    clip = ROOT / "example_workflows" / "example.mp4"
    assert clip.stat().st_size < 200_000
    frames = [
        hsv(torch.from_numpy(frame / 127.5 - 1).float().movedim(-1, 0)[None]) for frame in frames_of(clip)
    ]
    steps = [difference(before, now) for before, now in itertools.pairwise(frames)]
    assert [index for index, step in enumerate(steps, 1) if step > THRESHOLD] == [8]


ALONE = ("Settings", "FlashVSRSettings", "SwiftVRSettings", "LoRA")
"""Nodes that need no example: settings whose defaults suit most runs, and what needs a file of the user."""


def test_each_node_is_shown_in_one() -> None:
    shown = {node["type"] for path in WORKFLOWS for node in our_nodes(path)}
    assert shown == set(NODES) - {f"StreamDiffVSR_{name}" for name in ALONE}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_widget_values_stand_where_they_belong(path: Path) -> None:
    for node in our_nodes(path):
        widgets = widgets_of(node["type"])
        values = node.get("widgets_values") or []
        files = {model["name"] for model in node["properties"].get("models", ())}
        assert files <= set(values)
        assert len(values) == len(widgets), node["type"]
        for value, (name, kind, options) in zip(values, widgets, strict=True):
            assert name in FREE or value in files or fits(value, kind, options), (
                f"{node['type']}.{name} = {value!r}"
            )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_links_end_at_sockets_that_exist(path: Path) -> None:
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, origin, origin_slot, target, target_slot, kind in workflow["links"]:
        source, sink = nodes[origin], nodes[target]
        socket = sink["inputs"][target_slot]
        if source["type"] in NODES:
            assert kind in (NODES[source["type"]].RETURN_TYPES[origin_slot], "*")
            name = NODES[source["type"]].RETURN_NAMES[origin_slot]
            assert source["outputs"][origin_slot]["name"] == name
        if sink["type"] in NODES:
            wanted = inputs_of(sink["type"])[socket["name"]][0]
            assert kind == wanted
    for node in our_nodes(path):
        linked = {socket["name"] for socket in node["inputs"] if socket.get("link") is not None}
        sockets = {
            name
            for name, (kind, _) in NODES[node["type"]].INPUT_TYPES().get("required", {}).items()
            if not isinstance(kind, list) and kind not in WIDGET_TYPES
        }
        assert sockets <= linked, node["type"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_each_has_a_picture_and_says_nothing_of_the_machine(path: Path) -> None:
    assert path.with_suffix(".jpg").stat().st_size < 150_000
    text = path.read_text(encoding="utf-8")
    assert not [word for word in ("127.0.0.1", "localhost", "/home", "/opt", "/tmp", "C:\\") if word in text]


@pytest.mark.parametrize("name", ["vhs_meta_batch", "vhs_video_with_audio"])
def test_other_workflows_need_only_core_nodes(name: str) -> None:
    others = [path for path in WORKFLOWS if not path.stem.startswith("vhs")]
    foreign = {node["type"] for path in others for node in read(path)["nodes"]} - set(NODES)
    assert not [kind for kind in foreign if kind.startswith("VHS")]
    assert any(
        node["type"].startswith("VHS") for node in read(ROOT / "example_workflows" / f"{name}.json")["nodes"]
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_note_says_how_big_the_models_are_that_the_page_offers(path: Path) -> None:
    workflow = read(path)
    offered = [node for node in workflow["nodes"] if node.get("properties", {}).get("models")]
    said = " ".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert len(re.findall(r"\(\d+ MB\), which ComfyUI offers to download", said)) == len(offered)
