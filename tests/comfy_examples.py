"""Makes the example workflows, and the clip they show, in ComfyUI's real page: run it when nodes change.

    COMFYUI_PATH=... COMFYUI_PYTHON=... COMFYUI_VHS_PATH=... python tests/comfy_examples.py [NAME ...]

An example is a table here: a note, and nodes in columns from left to right. Those that need a newer ComfyUI
than COMFYUI_PATH's are left as they are; the page tells sizes and the form in which workflows are saved.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from comfy_page import ComfyPage
from comfy_server import Server
from node_clips import make_clip
from node_pack import ROOT

from stream_diffvsr.cli.demo import draw
from stream_diffvsr.media.sizes import resize

EXAMPLES = ROOT / "example_workflows"
FRAMES, WIDTH, HEIGHT, RATE = 16, 128, 72, 8
"""Of the clip."""
OURS = "StreamDiffVSR_"
NANO = (
    "**nano** is the small model that comes with this pack and runs anywhere; choose **v1** for full quality."
)
OWN_VIDEO = "To use your own video, replace **Example Video** with **Load Video**."
REAL_ESRGAN = {
    "name": "RealESRGAN_x4plus.safetensors",
    "url": "https://huggingface.co/Comfy-Org/Real-ESRGAN_repackaged/resolve/main/"
    "RealESRGAN_x4plus.safetensors",
    "directory": "upscale_models",
}
FILM = {
    "name": "film_net_fp16.safetensors",
    "url": "https://huggingface.co/Comfy-Org/frame_interpolation/resolve/main/frame_interpolation/"
    "film_net_fp16.safetensors",
    "directory": "frame_interpolation",
}


@dataclass(frozen=True)
class N:
    """A node: widgets by name, and links as 'node.output'."""

    name: str
    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    models: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class Example:
    note: str
    columns: tuple[tuple[N, ...], ...]
    extra: dict[str, Any] = field(default_factory=dict)


CLIP = N("clip", OURS + "ExampleVideo")
PARTS = N("parts", "GetVideoComponents", links={"video": "clip.video"})


def loader(model: str = "nano", **about: Any) -> N:
    return N("model", OURS + "Loader", {"model_version": model}, **about)


def upscale(images: str, **links: str) -> N:
    return N("upscale", OURS + "Upscale", {}, {"pipe": "model.pipe", "images": images, **links})


def to_file(pipe: str = "model.pipe", **links: str) -> N:
    return N("file", OURS + "UpscaleVideo", {}, {"pipe": pipe, "video": "clip.video", **links})


def video(images: str, prefix: str) -> tuple[tuple[N, ...], ...]:
    """Pictures and the clip's sound as a saved video."""
    made = N("made", "CreateVideo", {}, {"images": images, "audio": "parts.audio", "fps": "parts.fps"})
    return (made,), (N("save", "SaveVideo", {"filename_prefix": prefix}, {"video": "made.VIDEO"}),)


def some(first: int, count: int, name: str = "some") -> N:
    values = {"batch_index": first, "length": count}
    return N(name, "ImageFromBatch", values, {"image": "parts.images"})


def turn(number: int, before: str) -> N:
    """One frame, and the state that it takes and hands on."""
    links = {"pipe": "model.pipe", "image": f"frame{number}.IMAGE", "state": before}
    return N(f"turn{number}", OURS + "ProcessFrame", {}, links)


def suite_video(**links: str) -> N:
    values = {"frame_rate": 12, "filename_prefix": "stream_diffvsr/video", "format": "video/h264-mp4"}
    linked = {"images": "upscale.images", "audio": "load.audio", **links}
    return N("combine", "VHS_VideoCombine", values, linked)


BATCHED = {"video": "clip.path", "meta_batch": "batches.meta_batch"}

SHOWS = {
    OURS + "Upscale": 200,
    OURS + "ProcessFrame": 200,
    OURS + "Live": 240,
    OURS + "UpscaleVideo": 280,
    OURS + "SimpleUpscale": 280,
    "SaveVideo": 220,
    "SaveImage": 220,
    "PreviewImage": 220,
    "PreviewAny": 60,
    "ImageCompare": 300,
    "LoadImage": 220,
    "WebcamCapture": 200,
}
"""Room for what a node shows, in pixels."""
LINE = 110
"""Letters of a note."""
SPACE = N("", "")
"""Above a node that shall stand lower, so that a wire passes over it."""

TABLE = {
    "simple_upscale": Example(
        "## One node\n\nPress **Run**: the result, four times as large and with the original sound, "
        f"is saved in the output folder and shown on the node.\n\n{OWN_VIDEO} {NANO}",
        (
            (CLIP,),
            (N("simple", OURS + "SimpleUpscale", {"model": "nano"}, {"video": "clip.video"}),),
        ),
    ),
    "long_video_file": Example(
        "## Upscale a video of any length, file to file\n\nMemory use does not grow with the "
        "length of the video. Sound, timing and colours are kept.\n\nCancel whenever you like: the "
        "finished part remains as a playable file, and queueing the same workflow again resumes "
        f"the job.\n\n{OWN_VIDEO} {NANO}",
        ((CLIP, loader()), (to_file(),)),
    ),
    "simple_video": Example(
        "## Frames in, frames out\n\nUses only ComfyUI's own nodes and this pack's; other nodes "
        "can go in between.\n\nAll frames are kept in memory, so for a long video, use the workflow "
        f"*long_video_file*.\n\n{OWN_VIDEO} {NANO}",
        (
            (CLIP,),
            (PARTS, loader()),
            (SPACE, upscale("parts.images")),
            *video("upscale.images", "stream_diffvsr/video"),
        ),
    ),
    "before_after": Example(
        "## Before and after\n\n**Compare Images** needs ComfyUI 0.33 or newer, and *Nodes 2.0* "
        "turned on in the menu. Move the pointer over the picture to see the bicubic upscale on one side "
        f"and the result on the other.\n\n{OWN_VIDEO} {NANO}",
        (
            (CLIP,),
            (PARTS,),
            (some(0, 8), loader()),
            (
                N(
                    "bicubic",
                    "ImageScaleBy",
                    {"upscale_method": "bicubic", "scale_by": 4.0},
                    {"image": "some.IMAGE"},
                ),
                upscale("some.IMAGE"),
            ),
            (N("compare", "ImageCompare", {}, {"image_a": "bicubic.IMAGE", "image_b": "upscale.images"}),),
        ),
    ),
    "single_image": Example(
        f"## One image\n\nAn image is treated as a video of one frame.\n\n{NANO}",
        (
            (N("picture", "LoadImage", {"image": "example.png"}), loader()),
            (upscale("picture.IMAGE"),),
            (
                N(
                    "save",
                    "SaveImage",
                    {"filename_prefix": "stream_diffvsr/image"},
                    {"images": "upscale.images"},
                ),
            ),
        ),
    ),
    "save_state": Example(
        "## First part of a video, with its state saved\n\nUpscales the first 8 frames and saves "
        "the state. *resume_state* continues from there, even after a restart.",
        (
            (CLIP,),
            (PARTS,),
            (SPACE, some(0, 8), loader()),
            (SPACE, upscale("some.IMAGE")),
            (
                N("made", "CreateVideo", {}, {"images": "upscale.images", "fps": "parts.fps"}),
                N("keep", OURS + "SaveState", {}, {"state": "upscale.state"}),
                N("tell", OURS + "ExtractState", {}, {"state": "upscale.state"}),
            ),
            (
                N("save", "SaveVideo", {"filename_prefix": "stream_diffvsr/part_1"}, {"video": "made.VIDEO"}),
                N("shown", "PreviewAny", {}, {"source": "tell.info"}),
            ),
        ),
    ),
    "resume_state": Example(
        "## Continue from a saved state\n\nRun *save_state* first and reload the page, so that "
        "its file appears in the list. Frames 8 to 15 then continue after frame 7, bit-identical to an "
        "uninterrupted run.",
        (
            (CLIP,),
            (PARTS,),
            (
                SPACE,
                some(8, 8),
                loader(),
                N(
                    "before",
                    OURS + "LoadState",
                    {"state_file": "stream_diffvsr/state_00001_.safetensors [output]"},
                ),
            ),
            (SPACE, upscale("some.IMAGE", state="before.state")),
            (
                N("made", "CreateVideo", {}, {"images": "upscale.images", "fps": "parts.fps"}),
                N("keep", OURS + "SaveState", {}, {"state": "upscale.state"}),
            ),
            (N("save", "SaveVideo", {"filename_prefix": "stream_diffvsr/part_2"}, {"video": "made.VIDEO"}),),
        ),
    ),
    "frame_loop_with_state": Example(
        "## Frame by frame, with the state passed on\n\nUpscales three frames without a loop: each "
        "**Process Frame** takes the state from the previous one. In a loop, pass the state on from "
        "one iteration to the next.",
        (
            (CLIP,),
            (PARTS,),
            (
                N("start", OURS + "CreateState"),
                some(0, 1, "frame0"),
                SPACE,
                some(1, 1, "frame1"),
                SPACE,
                some(2, 1, "frame2"),
                loader(),
            ),
            (turn(0, "start.state"),),
            (*(SPACE,) * 3, turn(1, "turn0.state")),
            (*(SPACE,) * 6, turn(2, "turn1.state")),
            (N("two", "ImageBatch", {}, {"image1": "turn0.image", "image2": "turn1.image"}),),
            (SPACE, N("three", "ImageBatch", {}, {"image1": "two.IMAGE", "image2": "turn2.image"})),
            (N("save", "SaveImage", {"filename_prefix": "stream_diffvsr/frame"}, {"images": "three.IMAGE"}),),
        ),
    ),
    "loop_with_state": Example(
        "## A loop over frames that passes the state on\n\nNeeds ComfyUI 0.38 or newer, "
        "which has **Start Loop** and **End Loop**. Each iteration takes one frame and the "
        "previous iteration's state, so the result is the same as in a single run over all frames. "
        "You can add other nodes to the loop.\n\nSet **num_iterations** to the number of "
        f"frames.\n\n{OWN_VIDEO} {NANO}",
        (
            (CLIP, N("start", OURS + "CreateState")),
            (
                PARTS,
                N(
                    "loop",
                    "StartLoop",
                    {"mode": "simple", "mode.num_iterations": FRAMES},
                    {"initial_iteration_value": "start.state"},
                ),
                loader(),
            ),
            (
                SPACE,
                N(
                    "frame",
                    "ImageFromBatch",
                    {"length": 1},
                    {"image": "parts.images", "batch_index": "loop.iteration_index"},
                ),
            ),
            (
                *(SPACE,) * 2,
                N(
                    "turn",
                    OURS + "ProcessFrame",
                    {},
                    {
                        "pipe": "model.pipe",
                        "image": "frame.IMAGE",
                        "state": "loop.current_iteration_value",
                    },
                ),
            ),
            (
                SPACE,
                N(
                    "end",
                    "EndLoop",
                    {"accumulate": True},
                    {"output_value": "turn.image", "next_iteration_value": "turn.state"},
                ),
            ),
            (SPACE, N("all", "RebatchImages", {"batch_size": 4096}, {"images": "end.outputs"})),
            *video("all.IMAGE", "stream_diffvsr/loop"),
        ),
    ),
    "upscale_and_interpolate": Example(
        "## Larger and smoother\n\nUpscales the video, then uses ComfyUI's own frame interpolation "
        "to insert a frame between each pair of frames. Needs ComfyUI 0.33 or newer, and the model FILM "
        "(69 MB), which ComfyUI offers to download.\n\nSet **fps** of Create Video to twice "
        f"your video's frame rate; the sound stays as it is.\n\n{OWN_VIDEO} {NANO}",
        (
            (CLIP,),
            (PARTS, loader()),
            (
                SPACE,
                N("film", "FrameInterpolationModelLoader", {"model_name": FILM["name"]}, models=(FILM,)),
                upscale("parts.images"),
            ),
            (
                SPACE,
                N(
                    "between",
                    "FrameInterpolate",
                    {"multiplier": 2},
                    {"interp_model": "film.INTERP_MODEL", "images": "upscale.images"},
                ),
            ),
            (
                N(
                    "made",
                    "CreateVideo",
                    {"fps": 2.0 * RATE},
                    {"images": "between.IMAGE", "audio": "parts.audio"},
                ),
            ),
            (N("save", "SaveVideo", {"filename_prefix": "stream_diffvsr/smooth"}, {"video": "made.VIDEO"}),),
        ),
    ),
    "live_webcam": Example(
        "## A camera, frame by frame\n\nSet the queue to run **on change** or **instantly**, "
        "and press Run. Each run takes a picture and upscales it, guided by the previous "
        "run's frame.\n\nThe camera's picture is first reduced to a width of 160 pixels, so a CPU can "
        "keep up; a GPU can handle more.",
        (
            (N("camera", "WebcamCapture", {"width": 160, "height": 120}), loader()),
            (N("live", OURS + "Live", {}, {"pipe": "model.pipe", "image": "camera.IMAGE"}),),
            (
                N("shown", "PreviewImage", {}, {"images": "live.image"}),
                N("told", "PreviewAny", {}, {"source": "live.info"}),
            ),
        ),
    ),
    "flashvsr": Example(
        "## FlashVSR, for real footage\n\nNeeds a GPU (8 to 14 GB). The model, about 7 GB, is downloaded "
        "when the workflow first runs; the Loader shows the progress.\n\n" + OWN_VIDEO,
        ((CLIP, loader("flashvsr-v1.1")), (to_file(),)),
    ),
    "swiftvr": Example(
        "## SwiftVR, the fastest at 1080p and above\n\nNeeds a GPU. The model, about 20 GB, is downloaded "
        "when the workflow first runs; the Loader shows the progress.\n\n" + OWN_VIDEO,
        ((CLIP, loader("swiftvr")), (to_file(),)),
    ),
    "image_model_steady": Example(
        "## A single-image model, without flicker\n\nUse RealESRGAN_x4plus (67 MB), which ComfyUI offers to "
        "download, or any other model in *models/upscale_models*. **steady** blends in the previous result "
        "where both frames show the same thing; 0 turns this off.\n\n" + OWN_VIDEO,
        (
            (
                CLIP,
                loader(REAL_ESRGAN["name"], models=(REAL_ESRGAN,)),
                N("settings", OURS + "ImageSettings", {"steady": 0.6}),
            ),
            (to_file(settings="settings.settings"),),
        ),
    ),
    "several_devices": Example(
        "## Scenes spread over several devices\n\n**Runtime** sets the devices: *all*, or a list such as "
        "*cuda:0,cuda:1*, or *cpu:2* for two workers on the CPU. First run **python -m pip install "
        "ray** with ComfyUI's Python.\n\nEach scene goes to the next free device. With a "
        f"single device, everything runs on that device.\n\n{OWN_VIDEO} {NANO}",
        (
            (CLIP, loader()),
            (
                SPACE,
                N("runtime", OURS + "Runtime", {"devices": "all"}, {"pipe": "model.pipe"}),
            ),
            (to_file("runtime.pipe"),),
        ),
    ),
    "vhs_video_with_audio": Example(
        "## VideoHelperSuite in and out, with sound\n\nNeeds ComfyUI-VideoHelperSuite. Type the "
        "path of your video into **Load Video (Path)**, or use **Load Video (Upload)** "
        f"instead.\n\n{NANO}",
        (
            (CLIP,),
            (N("load", "VHS_LoadVideoPath", {"format": "None"}, {"video": "clip.path"}), loader()),
            (SPACE, upscale("load.IMAGE")),
            (suite_video(),),
        ),
    ),
    "vhs_meta_batch": Example(
        "## A long video in chunks, as one sequence\n\nNeeds ComfyUI-VideoHelperSuite. The "
        "**Meta Batch Manager** cuts the video into batches. Because it is also linked to **Upscale**, "
        "the sequence continues from batch to batch, and the result is the same as in a "
        f"single run.\n\n{NANO}",
        (
            (
                CLIP,
                SPACE,
                loader(),
                N("batches", "VHS_BatchManager", {"frames_per_batch": 8}),
            ),
            (N("load", "VHS_LoadVideoPath", {"format": "None"}, BATCHED),),
            (*(SPACE,) * 3, upscale("load.IMAGE", meta_batch="batches.meta_batch")),
            (suite_video(meta_batch="batches.meta_batch"),),
        ),
    ),
}
TABLE["simple_upscale.app"] = Example(
    "## One node, as an app\n\nChoose a video and press **Run**: the result, four times as "
    f"large and with the original sound, is saved in the output folder.\n\n{NANO}",
    (
        (N("clip", "LoadVideo", {"file": "video.mp4"}),),
        (N("simple", OURS + "SimpleUpscale", {"model": "nano"}, {"video": "clip.VIDEO"}),),
    ),
    {"linearMode": True, "linearData": {"inputs": [["1", "file"], ["2", "quality"]], "outputs": ["2"]}},
)

BUILD = """(({columns, note, shows, room}) => {
  app.graph.clear();
  const made = {}, gap = 110;
  let x = 0;
  for (const column of columns) {
    let y = 0;
    const nodes = column.map(({kind}) => kind && LiteGraph.createNode(kind));
    const width = Math.max(...nodes.map((node, at) => !node ? 0 :
      Math.max(node.computeSize()[0], column[at].kind in shows || column[at].models.length ? 360 : 300)));
    for (const [at, {name, kind, values, models}] of column.entries()) {
      if (!kind) { y += 150; continue; }
      const node = nodes[at];
      app.graph.add(node);
      for (const [key, value] of Object.entries(values)) {
        const widget = node.widgets.find((each) => each.name === key);
        widget.value = value;
        widget.callback?.(value);
      }
      if (models.length) node.properties.models = models;
      const height = node.computeSize()[1] + (shows[kind] ?? 0);
      node.setSize([width, height]);
      node.pos = [x, y];
      y += height + gap;
      made[name] = node;
    }
    x += width + 80;
  }
  for (const {name, links} of columns.flat()) {
    for (const [input, from] of Object.entries(links)) {
      const [source, output] = from.split("."), target = made[name];
      made[source].connect(made[source].findOutputSlot(output), target, target.findInputSlot(input));
    }
  }
  const text = LiteGraph.createNode("MarkdownNote");
  app.graph.add(text);
  text.widgets[0].value = note;
  text.pos = [0, -80 - room];
  text.setSize([620, room]);
  return app.graph.serialize();
})"""


def scene(index: int, width: int, height: int) -> np.ndarray:
    """The demo's drawing, as a frame of uint8; in the second half in other colours: another scene."""
    picture = draw(2 * (index % (FRAMES // 2)) / FRAMES)
    if 2 * index >= FRAMES:
        picture = 1 - picture.flip(1)
    return (resize(picture, (height, width))[0].movedim(0, -1) * 255).round().byte().numpy()


def put_inputs(folder: Path) -> None:
    """What the examples load from ComfyUI's input folder."""
    from PIL import Image

    make_clip(folder / "video.mp4", FRAMES, WIDTH, HEIGHT, RATE, draw=scene)
    Image.fromarray(scene(0, WIDTH, HEIGHT)).save(folder / "example.png")


def built(page: ComfyPage, name: str, example: Example) -> dict[str, Any]:
    columns = [[vars(node) for node in column] for column in example.columns]
    lines = sum(math.ceil(len(part) / LINE) for part in example.note.split("\n\n"))
    about = {"columns": columns, "note": example.note, "shows": SHOWS, "room": 50 + 22 * lines}
    workflow = page.evaluate(f"{BUILD}({json.dumps(about)})")
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"stream-diffvsr {name}"))
    workflow["extra"] = example.extra
    return workflow


def main() -> None:
    make_clip(EXAMPLES / "example.mp4", FRAMES, WIDTH, HEIGHT, RATE, draw=scene, crf=12)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder, "comfy"))
        put_inputs(server.base / "input")
        server.start()
        server.post("/settings/Comfy.TutorialCompleted", True)
        there = set(server.get("/object_info"))
        page = ComfyPage(Path(folder, "page"))
        try:
            page.open_page(server.port)
            for name, example in TABLE.items():
                kinds = {node.kind for column in example.columns for node in column} - {""}
                if (len(sys.argv) == 1 or name in sys.argv) and kinds <= there:
                    text = json.dumps(built(page, name, example), indent=1, ensure_ascii=False)
                    (EXAMPLES / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        finally:
            page.close()
            server.stop()


if __name__ == "__main__":
    main()
