"""The pack as a whole: how it loads, and what it shows to the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from node_pack import ROOT, load_pack
from node_pack import part as module

SCHEMAS = Path(__file__).parent / "node_schemas.json"
HEAVY = ("diffusers", "transformers", "torchvision", "cv2", "av", "huggingface_hub", "accelerate", "PIL")

LOAD = """
import sys; sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
before = set(sys.modules)
for name in {missing!r}: sys.modules[name] = None
from node_pack import load_pack
pack = load_pack(Path({folder!r}))
"""


def run_python(
    code: str, folder: Path = ROOT, missing: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Load the pack in a fresh interpreter, then run `code`."""
    head = LOAD.format(tests=str(ROOT / "tests"), folder=str(folder), missing=missing)
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def nodes() -> dict[str, type]:
    return load_pack().NODE_CLASS_MAPPINGS


def frozen(node: type) -> dict:
    """What workflows and other programs rely on; lists that differ from machine to machine left out."""
    inputs = {}
    for group, widgets in node.INPUT_TYPES().items():
        inputs[group] = [[name, plain(name, spec)] for name, spec in widgets.items()]
    outputs = [list(pair) for pair in zip(node.RETURN_TYPES, node.RETURN_NAMES, strict=True)]
    return {"inputs": inputs, "outputs": outputs, "output_node": getattr(node, "OUTPUT_NODE", False)}


def plain(name: str, spec: object) -> object:
    if isinstance(spec, str):
        return spec
    kind, *rest = spec  # type: ignore[misc]
    options = {key: value for key, value in (rest[0] if rest else {}).items() if key != "tooltip"}
    if name in ("model", "model_version", "device", "state_file"):
        return [kind[:2] if name != "state_file" else "files", options]
    return [kind, options]


def test_schemas_are_frozen(nodes: dict[str, type]) -> None:
    """Renaming or reordering breaks saved workflows; new inputs only at the end, optional."""
    now = {name: frozen(node) for name, node in nodes.items()}
    assert now == json.loads(SCHEMAS.read_text(encoding="utf-8"))


def test_the_nodes_are_there(nodes: dict[str, type]) -> None:
    names = (
        "Loader Upscale UpscaleVideo ProcessFrame CreateState ExtractState SaveState LoadState Settings "
        "FlashVSRSettings SwiftVRSettings ImageSettings SimpleUpscale Live LoRA Runtime ExampleVideo"
    )
    assert set(nodes) == {f"StreamDiffVSR_{name}" for name in names.split()}


def test_display_names() -> None:
    pack = load_pack()
    assert set(pack.NODE_DISPLAY_NAME_MAPPINGS) == set(pack.NODE_CLASS_MAPPINGS)
    assert all(name.startswith("Stream-DiffVSR ") for name in pack.NODE_DISPLAY_NAME_MAPPINGS.values())


def test_errors_are_named_without_the_folder_of_the_pack() -> None:
    """ComfyUI shows the module of an error, which would be a path."""
    errors = module(load_pack(), "stream_diffvsr.errors")
    for name in (
        "ModelNotFoundError",
        "CheckpointError",
        "IncompatibleInputError",
        "VRAMError",
        "VideoError",
    ):
        assert getattr(errors, name).__module__ == "stream_diffvsr"


def test_everything_has_words_for_the_user(nodes: dict[str, type]) -> None:
    for name, node in nodes.items():
        assert node.DESCRIPTION and node.SEARCH_ALIASES, name
        assert node.CATEGORY.split("/")[0] == "StreamDiffVSR"
        assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        assert all(node.OUTPUT_TOOLTIPS)
        for group in ("required", "optional"):
            for widget, (_, options) in node.INPUT_TYPES().get(group, {}).items():
                said = options.get("tooltip", "")
                assert said.endswith(".") and "  " not in said, f"{name}.{widget}: {said!r}"


def test_seeds_stay_fixed(nodes: dict[str, type]) -> None:
    """Queueing again must mean the same job."""
    seeds = [
        options
        for node in nodes.values()
        for widget, (_, options) in node.INPUT_TYPES().get("optional", {}).items()
        if widget == "seed"
    ]
    assert len(seeds) == 4
    assert all(options["control_after_generate"] == "fixed" for options in seeds)


def test_every_node_has_a_help_page_with_a_picture(nodes: dict[str, type]) -> None:
    docs = ROOT / "web" / "docs"
    for name, node in nodes.items():
        text = (docs / f"{name}.md").read_text(encoding="utf-8")
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
        assert pictures, name
        assert all((docs / picture).is_file() for picture in pictures), name
        for group in ("required", "optional"):
            for widget, (_, options) in node.INPUT_TYPES().get(group, {}).items():
                line = rf"^\*\*{widget}\*\*( \([^\n]*\))?: " + re.escape(options["tooltip"]) + "$"
                assert re.search(line, text, re.MULTILINE), f"{name}: {widget} has another tooltip"
        for output, tooltip in zip(node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True):
            assert f"**{output}**: {tooltip}\n" in text, f"{name}: {output} has another tooltip"


def test_help_pages_belong_to_nodes(nodes: dict[str, type]) -> None:
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(nodes)


def test_the_page_loads_one_script_of_ours() -> None:
    """ComfyUI's page runs every script below web/."""
    assert [path.name for path in (ROOT / "web").rglob("*.*js")] == ["nodes.js"]


def test_loading_prints_nothing_and_imports_nothing_heavy() -> None:
    code = f"print([name for name in {HEAVY!r} if name in sys.modules and name not in before])"
    done = run_python(code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_loading_imports_next_to_nothing() -> None:
    """What keeps the import below 50 ms beyond torch; a list of modules, since a time depends on the load."""
    code = """
new = [name for name in sys.modules if name not in before and not name.startswith(("nodes", "node_pack"))]
ours = [name.removeprefix(pack.__name__).lstrip(".") for name in new if name.startswith(pack.__name__)]
print(sorted(name for name in ours if not name.startswith("nodes")))
print(sorted(name for name in new if not name.startswith(pack.__name__)))
"""
    ours, others = run_python(code).stdout.splitlines()
    families = ["families", "families.diffvsr", "families.diffvsr.options", "families.diffvsr.state"]
    engine = ["", "devices", "errors", *families, "options", "tensors", "upscaler"]
    assert ours == repr(["", *(f"stream_diffvsr.{name}".rstrip(".") for name in engine)])
    assert others == "[]"


def test_missing_packages_do_not_break_loading() -> None:
    done = run_python("print(len(pack.NODE_CLASS_MAPPINGS))", missing=HEAVY)
    assert (done.stdout.strip(), done.stderr) == ("17", "")


@pytest.mark.parametrize(
    ("missing", "node", "inputs"),
    [
        ("diffusers", "Loader", ("nano", "cpu", "auto")),
        ("av", "UpscaleVideo", (None, sys.executable)),
        ("einops", "CreateState", (torch.zeros(1, 8, 8, 3),)),
    ],
)
def test_the_node_that_needs_a_missing_package_says_how_to_install_it(
    missing: str, node: str, inputs: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pack"  # under a new name, so that all of it is imported anew
    folder.symlink_to(ROOT, target_is_directory=True)
    pack = load_pack(folder)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"'{missing}'.*pip install -r.*requirements\.txt"):
        pack.NODE_CLASS_MAPPINGS["StreamDiffVSR_" + node]().execute(*inputs)


@pytest.mark.parametrize("name", ["ComfyUI-Stream-DiffVSR", "my pack", "Überpack-上", "1"])
def test_the_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(ROOT / "__init__.py", folder)
    for part in ("nodes", "stream_diffvsr"):
        shutil.copytree(
            ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
        )
    pack = load_pack(folder)
    assert len(pack.NODE_CLASS_MAPPINGS) == 17
    assert (
        Path(pack.NODE_CLASS_MAPPINGS["StreamDiffVSR_Loader"].__module__.removesuffix(".nodes.load"))
        == folder
    )


def test_requirements_are_lower_bounds_and_name_no_opencv_or_torch() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z_]+>=[\d.]+", line) for line in requirements)
    assert len(set(requirements)) == len(requirements)
    assert not [line for line in requirements if re.match("torch|opencv", line)]


def test_requirements_name_what_a_host_holds_first() -> None:
    """Solvers then look for a diffusers that fits the host's transformers, and not the other way round."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    names = re.findall(r"^[A-Za-z_]+(?=>=)", text, re.MULTILINE)
    assert names[:2] == ["transformers", "huggingface_hub"]


def test_requirements_are_the_distributions_without_what_comfyui_brings() -> None:
    """torch and torchvision are ComfyUI's; any OpenCV that is installed serves."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    own = set(re.findall(r"^[A-Za-z_]+>=[\d.]+", lines, re.MULTILINE))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.findall(r'"([^"]+)"', text.partition("dependencies = [")[2].partition("]")[0])
    assert own == {line for line in declared if not re.match("torch|opencv", line)}


def test_what_the_registry_reads() -> None:
    """[tool.comfy], an icon of at most 400 pixels in this repository, and an archive that holds the pack."""
    from PIL import Image

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[tool.comfy]")[2].partition("\n[")[0]
    said = dict(re.findall(r'^([\w-]+) = "([^"]+)"$', section, re.MULTILINE))
    assert (said["PublisherId"], said["DisplayName"]) == ("cedarconnor", "Stream-DiffVSR")
    assert said["requires-comfyui"] == ">=0.3.64"
    repository = re.search(r'^Repository = "https://github.com/([^"]+)"$', text, re.MULTILINE)
    assert repository
    start = f"https://raw.githubusercontent.com/{repository[1]}/main/"
    with Image.open(ROOT / said["Icon"].removeprefix(start)) as icon:
        assert max(icon.size) <= 400
    with Image.open(ROOT / said["Banner"].removeprefix(start)) as banner:
        assert banner.width * 9 == banner.height * 21
    for name in ("Documentation", "Issues"):
        assert re.search(rf'^{name} = "https://github.com/{repository[1]}[/#]', text, re.MULTILINE)
    left_out = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    needed = ("nodes", "stream_diffvsr", "web", "example_workflows", "__init__", "requirements", "pyproject")
    assert not [line for line in left_out if line.lstrip("/*").startswith(needed)]


def test_pictures_of_the_readme_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert pictures
    assert all((ROOT / picture).stat().st_size < 300_000 for picture in pictures)
