"""Other runtimes than PyTorch: the same numbers, exact continuity, and files that are kept whole."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from samples import moving, shift_flow
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stream_diffvsr import IncompatibleInputError, StreamDiffVSRError, UpscaleOptions, load_pipeline
from stream_diffvsr.bench.networks import random_network
from stream_diffvsr.cli.main import main
from stream_diffvsr.families.diffvsr.control import Control
from stream_diffvsr.families.diffvsr.pipeline import StreamDiffVSRPipeline
from stream_diffvsr.flow import open_flow
from stream_diffvsr.runtimes.choose import open_runtime
from stream_diffvsr.runtimes.graph import Call, Graph
from stream_diffvsr.runtimes.kept import MANIFEST, built_once, expected_seconds

CPU = torch.device("cpu")

TOLERANCE = 1e-4

PACKAGES = {"openvino": "openvino", "onnx": "onnxruntime"}

UNET = {
    "in_channels": 7, "out_channels": 4, "sample_size": 16, "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4,
}  # fmt: skip
"""The smallest network with all kinds of parts: an export of it takes seconds."""

CONTROL = {key: UNET[key] for key in UNET if key not in ("out_channels", "sample_size", "up_block_types")}
CONTROL["conditioning_embedding_out_channels"] = [4, 4, 8]
CONTROL["conditioning_channels"] = 3

VAE = {
    "latent_channels": 4, "block_out_channels": [8, 8, 8], "num_encoder_blocks": [0, 1, 1],
    "num_decoder_blocks": [1, 1, 0],
}  # fmt: skip


class Prompts:
    """Where prompt embeddings are read from a folder elsewhere."""

    def get(self, prompt: str) -> torch.Tensor:
        return torch.ones(1, 77, 8)


@pytest.fixture(params=PACKAGES)
def name(request) -> str:
    if importlib.util.find_spec(PACKAGES[request.param]) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """One folder for all of pytest's processes: what one builds the others find."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base / "runtimes"))
        yield


@pytest.fixture(scope="module")
def tiny() -> StreamDiffVSRPipeline:
    torch.manual_seed(0)
    networks = {
        part: random_network(part, config, CPU, torch.float32)
        for part, config in {"unet": UNET, "controlnet": CONTROL, "vae": VAE}.items()
    }
    return StreamDiffVSRPipeline(
        unet=networks["unet"],
        control=Control(networks["controlnet"]),
        vae=networks["vae"],
        flow=open_flow(shift_flow, lambda name: pytest.fail(name)),
        prompts=Prompts(),  # type: ignore[arg-type]
        scheduler_config={},
        device=CPU,
        dtype=torch.float32,
        model="tiny",
    )


def on(pipe: StreamDiffVSRPipeline, name: str) -> StreamDiffVSRPipeline:
    runtime = open_runtime(name, "cpu", CPU, "float32", "none")
    assert runtime is not None
    return pipe.on(runtime)


def test_a_graph_runs_at_every_size_and_is_kept(name, monkeypatch):
    """Two layers, which are exported in seconds; whole networks are in the tests marked long."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.SiLU())
    graph = Graph("layers", network, (torch.zeros(1, 3, 10, 14),))
    for _ in range(2):
        runtime = open_runtime(name, "cpu", CPU, "float32", "none")
        assert runtime is not None
        call = runtime.open(graph)
        for size in ((10, 14), (8, 8), (21, 33)):
            x = torch.randn(1, 3, *size)
            torch.testing.assert_close(call(x)[0], network(x), atol=1e-6, rtol=0)
        first = call(x)[0]
        kept = first.clone()
        call(x + 1)
        assert torch.equal(first, kept)  # in memory of its own
        monkeypatch.setattr(Graph, "export", lambda graph: pytest.fail("exported again"))


class Eager:
    """A runtime whose graphs are the networks themselves: all but the conversion is as with the others."""

    name, dtype, number_format, details = "eager", torch.float32, "float32", "as it is"
    needs_profile = False

    def __init__(self) -> None:
        self.opened: list[tuple[str, str]] = []

    def open(self, graph: Graph) -> Call:
        self.opened.append((graph.name, graph.form))

        def call(*inputs: torch.Tensor) -> list[torch.Tensor]:
            out = graph.network(*inputs)
            return [out] if isinstance(out, torch.Tensor) else list(out)

        return call


def test_all_graphs_are_ready_before_the_first_frame(tiny):
    """With progress, once for each kind of size, and none that frames without guidance do not take."""
    runtime, told, options = Eager(), [], UpscaleOptions(num_inference_steps=1, occlusion="mask")
    pipe = tiny.on(runtime)
    session = pipe.session(options, on_step=lambda *step: told.append(step))
    clip = moving(3, 16, 24)
    results = [result for lq in clip.split(1) for result in session.push(lq)]
    names = {name for name, _ in runtime.opened}
    assert names == {"unet", "control", "embed", "features", "decode", "decode-first"}
    assert told[:6] == [("build", index, 6) for index in range(1, 7)]
    assert [step for step in told[6:] if step[0] == "build"] == []
    expected, _ = tiny(clip, options)
    for result, hq in zip(results, expected, strict=True):
        torch.testing.assert_close(result.hq[0], hq, atol=2e-5, rtol=0)
    pipe.process_frame(moving(1, 16, 28), options=options)
    assert len(runtime.opened) == 6, "these sizes share their graphs"


@pytest.mark.parametrize("size", [(12, 20), (8, 8), (150, 30)])
def test_a_profile_covers_the_sizes_it_is_for(tiny, size):
    """A runtime that must know sizes beforehand gets shapes that the networks accept, and that hold ours."""

    class Ranged(Eager):
        needs_profile = True

        def open(self, graph: Graph) -> Call:
            assert graph.profile is not None
            smallest, largest = graph.profile
            for shapes in graph.profile:
                with FakeTensorMode(allow_non_fake_inputs=True):
                    graph.network(
                        *(x.new_zeros(shape) for x, shape in zip(graph.inputs, shapes, strict=True))
                    )
            call = super().open(graph)

            def checked(*inputs: torch.Tensor) -> list[torch.Tensor]:
                for x, low, high in zip(inputs, smallest, largest, strict=True):
                    fits = zip(low, x.shape, high, strict=True)
                    assert all(least <= side <= most for least, side, most in fits), (graph.name, x.shape)
                return call(*inputs)

            return checked

    runtime, options = Ranged(), UpscaleOptions(num_inference_steps=1, occlusion="mask")
    pipe, clip = tiny.on(runtime), moving(2, *size)
    torch.testing.assert_close(pipe(clip, options)[0], tiny(clip, options)[0], atol=2e-5, rtol=0)
    count = len(runtime.opened)
    pipe(moving(2, size[0], size[1] + 8), options)
    assert len(runtime.opened) == count, "one engine for a range of sizes"
    pipe(moving(2, size[0], size[1] + 128), options)
    assert len(runtime.opened) > count


@pytest.mark.long
def test_tensorrt_is_told_the_names_and_shapes(tiny, tmp_path):
    """As its settings want them; ONNX Runtime itself reads the converted graph at both ends."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from stream_diffvsr.runtimes.onnx import _convert, profile_settings

    for name in ("unet", "decode"):
        graph = on(tiny, "onnx").built._graph(name, "", (256, 384))  # type: ignore[union-attr]
        assert graph.profile is not None
        path = tmp_path / f"{name}.onnx"
        _convert(graph, path)
        told = profile_settings(path, graph.profile)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = {each.name: each.shape for each in session.get_inputs()}
        for ends in told.values():
            shapes = dict(part.split(":") for part in ends.split(","))
            assert set(shapes) == {name for name, shape in names.items() if shape}
        kinds = {each.name: each.type for each in session.get_inputs()}
        small = dict(part.split(":") for part in told["trt_profile_min_shapes"].split(","))
        feed = {
            name: torch.zeros(
                [int(side) for side in small[name].split("x")] if name in small else [],
                dtype=torch.int64 if "int64" in kinds[name] else torch.float32,
            ).numpy()
            for name in names
        }
        assert session.run(None, feed)[0].shape[0] == 1


def test_cancel_while_building_leaves_a_pipe_that_works(tiny):
    class CancelledError(Exception):
        pass

    def cancel(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("build", 2):
            raise CancelledError

    pipe = tiny.on(Eager())
    with pytest.raises(CancelledError):
        pipe.process_frame(moving(1), on_step=cancel)
    assert pipe.process_frame(moving(1), options=UpscaleOptions(num_inference_steps=1)).hq.shape[1] == 3


@pytest.mark.parametrize("error", [MemoryError("bad alloc"), RuntimeError("std::bad_alloc")])
def test_memory_that_ends_while_building(tiny, error):
    class Full(Eager):
        def open(self, graph: Graph) -> Call:
            raise error

    with pytest.raises(StreamDiffVSRError, match="memory ran out while eager was preparing 'unet'"):
        tiny.on(Full()).process_frame(moving(1))


def test_how_long_it_takes_is_said_and_learnt(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with built_once(tmp_path, KEY, 10**9, write):
        pass
    assert "converting g once for" in caplog.text and "(about 38 s)" in caplog.text
    (manifest,) = tmp_path.glob(f"*/{MANIFEST}")
    content = json.loads(manifest.read_text())
    assert content["bytes"] == 10**9 and content["seconds"] < 8
    manifest.write_text(json.dumps({**content, "seconds": 76.0}))
    assert expected_seconds(tmp_path, 10**9) == pytest.approx(76)
    assert expected_seconds(tmp_path, 2 * 10**9) == pytest.approx(2 * 68)


OPTIONS = {
    "usual": UpscaleOptions(num_inference_steps=2),
    "masked": UpscaleOptions(num_inference_steps=2, occlusion="mask"),
    "kept residuals": UpscaleOptions(num_inference_steps=2, control_every=2, guidance_scale=2.0),
    "tiles": UpscaleOptions(num_inference_steps=1, memory_plan="tiled", tile_size=64, tile_overlap=16),
}


@pytest.mark.long
def test_same_numbers_and_exact_continuity(tiny, name):
    """Of whole frames, at several sizes, some as small as can be; built files are found again."""
    pipe, again = on(tiny, name), on(tiny, name)
    for size in ((12, 20), (8, 8), (9, 30)):
        clip = moving(3, *size)
        for told, options in OPTIONS.items():
            expected, _ = tiny(clip, options)
            got, state = pipe(clip, options)
            error = (got - expected).abs().max()
            assert error <= TOLERANCE, (size, told, error)
            assert expected[1:].std() > 0.01
            first, between = again(clip[:1], options)
            rest, _ = again(clip[1:], options, between)
            assert torch.equal(torch.cat([first, rest]), got), (size, told)
    assert state.metadata["runtime"] == name == pipe.info.runtime
    assert state.metadata[name] == pipe.runtime_details


@pytest.mark.long
def test_a_change_of_runtime_is_told(tiny, name, caplog):
    _, state = tiny(moving(1), UpscaleOptions(num_inference_steps=1))
    on(tiny, name).process_frame(moving(2)[1:], state, UpscaleOptions(num_inference_steps=1))
    assert f"runtime: torch -> {name}" in caplog.text


@pytest.mark.long
def test_bands_are_the_same(tiny, name):
    clip = moving(2)
    whole, _ = on(tiny, name)(clip, UpscaleOptions(num_inference_steps=1))
    banded, _ = on(tiny, name)(clip, UpscaleOptions(num_inference_steps=1, memory_plan="banded"))
    assert (whole - banded).abs().max() <= TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("case", ["A", "B", "C_resize"])
def test_recorded_numbers(pipe, golden: Path, name, case):
    """The reference's, as in test_golden; the export of these networks takes minutes."""
    from test_golden import assert_near, upscale

    recorded = load_file(golden / f"case_{case}.safetensors")
    count = len(recorded["init_latents"])
    got = upscale(on(pipe, name), recorded, UpscaleOptions(), count, recorded["flows"])
    assert_near(got, recorded["hq"])


@pytest.mark.long
def test_same_bits_in_each_process(checkpoint, name, tmp_path):
    """And with one and two threads, where the runtime gives that."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); "
        "torch.set_num_threads(int(sys.argv[4]))\nfrom samples import moving, shift_flow\nfrom "
        "stream_diffvsr import load_pipeline\npipe = load_pipeline(sys.argv[2], device='cpu', "
        "flow=shift_flow, runtime=sys.argv[3])\ntorch.save(pipe(moving(2, 24, 40))[0], sys.argv[5])"
    )
    results = []
    for index, threads in enumerate((1, 1, 2)):
        file = tmp_path / f"{index}.pt"
        here = str(Path(__file__).parent)
        command = [sys.executable, "-c", code, here, str(checkpoint), name, str(threads), str(file)]
        subprocess.run(command, check=True)
        results.append(torch.load(file, weights_only=True))
    assert torch.equal(results[0], results[1])
    if name == "onnx":  # shift_flow has no sums that torch shares out
        assert torch.equal(results[0], results[2])


@pytest.mark.long
def test_auto_chooses_once_and_tells(tiny, caplog, monkeypatch):
    from stream_diffvsr.families.diffvsr import fastest

    caplog.set_level(logging.INFO)
    chosen = fastest.fastest(tiny)
    assert chosen.runtime in ("torch", *PACKAGES)
    assert f"runtime {chosen.runtime}, the fastest exact one here" in caplog.text
    monkeypatch.setattr(fastest, "_measure", lambda pipes: pytest.fail("measured again"))
    assert fastest.fastest(tiny).runtime == chosen.runtime


@pytest.mark.long
def test_export_builds_what_a_run_then_finds(checkpoint, name, capsys):
    """Afterwards nothing is exported, at other sizes of the form neither."""
    command = ["export", "--model", str(checkpoint), "--device", "cpu", "--flow", "dis", "--runtime", name]
    assert main([*command, "--sizes", "40x24"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert {path.name.partition("-")[0] for path in folder.iterdir() if path.is_dir()} >= {"unet", "control"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graph, "export", lambda graph: pytest.fail("exported again"))
        pipe = load_pipeline(checkpoint, device="cpu", flow="dis", runtime=name)
        pipe(moving(2, 32, 48), UpscaleOptions(num_inference_steps=1))  # type: ignore[operator]
    assert main([*command, "--runtime", "torch", "--sizes", "40x24"]) == 2


# What is refused, in one sentence.


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package(checkpoint, monkeypatch, name, capsys, tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (16, 16)).save(picture)
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*, or choose runtime torch"):
        load_pipeline(checkpoint, device="cpu", runtime=name)
    assert main(["upscale", str(picture), "--model", str(checkpoint), "--runtime", name]) == 1
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"runtime": "tflite"}, "runtime must be one of torch"),
        ({"runtime": "torch", "provider": "cuda"}, "runtime torch needs provider auto"),
        ({"runtime": "openvino", "provider": "tensorrt"}, "one of OpenVINO's"),
        ({"runtime": "openvino", "provider": "npu"}, "OpenVINO found no 'npu' device here"),
        ({"runtime": "openvino", "quantize": "int8"}, "quantize none"),
        ({"runtime": "onnx", "provider": "cuda"}, "one that this ONNX Runtime supports"),
        ({"runtime": "onnx", "dtype": "bfloat16"}, "dtype float32 or float16"),
    ],
)
def test_what_cannot_be(checkpoint, settings, sentence):
    package = PACKAGES.get(settings["runtime"])
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with pytest.raises(IncompatibleInputError, match=sentence):
        load_pipeline(checkpoint, device="cpu", flow="none", **settings)


# Files that are kept.


def write(folder: Path) -> None:
    (folder / "model").write_bytes(b"model")
    (folder.parent / "made").open("a").write("x")


KEY = {"graph": "g", "weights": "w", "openvino": "1"}


def use(root: Path, key=KEY) -> int:
    """How often something was made so far."""
    with built_once(root, key, 5, write) as folder:
        assert (folder / "model").read_bytes() == b"model"
    return len((root / "made").read_text())


def test_made_once_under_all_it_depends_on(tmp_path):
    assert (use(tmp_path), use(tmp_path)) == (1, 1)
    for changed in ("weights", "openvino", "graph"):
        before = len((tmp_path / "made").read_text())
        assert use(tmp_path, {**KEY, changed: "other"}) == before + 1
    assert use(tmp_path) == 4


@pytest.mark.parametrize("damage", ["shorter", "other", "gone", "manifest", "key"])
def test_a_torn_file_is_made_again(tmp_path, damage):
    use(tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    manifest = json.loads((folder / MANIFEST).read_text())
    if damage == "gone":
        (folder / "model").unlink()
    elif damage == "manifest":
        (folder / MANIFEST).write_text(json.dumps(manifest)[:20])
    elif damage == "key":
        (folder / MANIFEST).write_text(json.dumps({**manifest, "key": {**KEY, "openvino": "0"}}))
    else:
        (folder / "model").write_bytes(b"mod" if damage == "shorter" else b"modem")
    assert (use(tmp_path), use(tmp_path)) == (2, 2)


def test_a_process_that_was_killed_leaves_no_trace(tmp_path):
    def fail(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), built_once(tmp_path, KEY, 5, fail):
        pass
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert use(tmp_path) == 2


def test_two_processes_at_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from stream_diffvsr.runtimes.kept import built_once\n"
        "def make(folder):\n"
        "    (folder / 'model').write_bytes(b'model'); (folder.parent / 'made').open('a').write('x')\n"
        "    time.sleep(3)\n"
        f"with built_once(Path(sys.argv[1]), {KEY!r}, 5, make) as folder: assert (folder / 'model').is_file()"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert use(tmp_path) == 1


def test_a_folder_that_cannot_be_written(tmp_path, caplog):
    """As a file in its place, which keeps even root from writing there."""
    (tmp_path / "root").write_bytes(b"")
    with built_once(tmp_path / "root", KEY, 5, lambda folder: (folder / "model").write_bytes(b"m")) as folder:  # type: ignore[arg-type,return-value]
        assert (folder / "model").is_file()
    assert not folder.exists()
    assert "it is built for this run only" in caplog.text


def test_a_folder_that_can_only_be_read(tmp_path):
    use(tmp_path)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for path in (*folder.iterdir(), folder, tmp_path):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert use(tmp_path) == 1
    finally:
        tmp_path.chmod(0o755)
        folder.chmod(0o755)


def test_other_weights_are_another_graph():
    """Also where a single weight of a matrix's ends was trained."""
    layer = nn.Linear(4, 4)
    graph = Graph("g", layer, (torch.zeros(1, 4),))
    before = graph.key()
    assert before == Graph("g", layer, (torch.zeros(1, 4),)).key()
    with torch.no_grad():
        layer.bias += 1
    assert graph.key() != before
