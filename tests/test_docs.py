"""Every command, Python example and link in README and docs is tried."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import clips
import pytest
import torch
from family_cases import CASES, image_model
from PIL import Image
from safetensors.torch import save_file
from test_lora import make as make_lora

from stream_diffvsr import load_pipeline
from stream_diffvsr.cli.main import main, parse
from stream_diffvsr.weights.folders import NANO

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "training/README.md")]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES += DOCS
LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "web" / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a page in that language ("" for commands)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return [text for kind, text in found if kind == language]


def commands() -> list[str]:
    """Every line that begins with `stream-diffvsr`, in blocks and between backticks."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for kind in ("", "bash") for block in blocks(page, kind) for line in block.splitlines()]
        lines += re.findall(r"`(stream-diffvsr [^`\s]+ [^`\n]+)`", text)
        lines += re.findall(r"^    (stream-diffvsr .+)$", text, re.M)
        lines = [part.removeprefix("uv run ") for line in lines for part in line.split(" && ")]
        found += [line.split("  #")[0].strip() for line in lines if line.startswith("stream-diffvsr ")]
    return sorted({line for line in found if not re.search(r"\b[A-Z]{3,}\b|\.\.\.", line)})


DOES = [
    line
    for line in commands()
    # Those of several devices need Ray: tests/test_ray.py.
    if line.startswith("stream-diffvsr upscale") and not re.search("--devices|--ray", line)
]
LOOKS = [line for line in commands() if line.startswith(("stream-diffvsr doctor", "stream-diffvsr scenes"))]


def test_there_are_commands():
    assert len(commands()) > 10


@pytest.mark.parametrize("line", commands())
def test_the_command_is_understood(line):
    parse(shlex.split(line)[1:])


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that README speaks of, and tiny models under the names of the large ones."""
    models = tmp_path / "models"
    shutil.copytree(NANO, models / "v1")
    CASES["flashvsr"].make(models)
    save_file(torch.load(image_model(tmp_path), weights_only=True), tmp_path / "4x-model.safetensors")
    monkeypatch.setenv("STREAM_DIFFVSR_MODELS", str(models))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "holiday").mkdir()
    make_lora(tmp_path / "my_anime.safetensors", load_pipeline("nano", device="cpu"), names="unet")
    for name in ("clip", "one", "two", "episode", "holiday/beach"):
        clips.write_video(tmp_path / f"{name}.mp4", 2)
    clips.write_video(tmp_path / "film.mkv", 2)
    clips.write_video(tmp_path / "long.mp4", 11, times=[25600 * i for i in range(11)])
    Image.new("RGB", (16, 12), "teal").save(tmp_path / "photo.png")
    return tmp_path


@pytest.mark.parametrize("line", DOES)
def test_the_command_does_it(line, desk):
    before = set(desk.iterdir())
    assert main([*shlex.split(line)[1:], "--device", "cpu"]) == 0
    assert set(desk.iterdir()) - before or "--plan" in line


@pytest.mark.parametrize("line", LOOKS)
def test_the_command_shows_it(line, desk, capsys):
    before = set(desk.rglob("*"))
    assert main(shlex.split(line)[1:]) == 0 and capsys.readouterr().out
    assert set(desk.rglob("*")) == before


def test_extras_and_scripts_are_there():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    extras = {name for names in re.findall(r"stream-diffvsr\[([\w,]+)\]", text) for name in names.split(",")}
    extras |= set(re.findall(r"--extra (\w+)", text))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert len(extras) > 5 and [name for name in extras if f"\n{name} = [" not in project] == []
    scripts = [*re.findall(r"python (benchmarks/\w+\.py)", text)]
    scripts += [f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (training\.\w+)", text)]
    assert len(scripts) > 5 and [name for name in scripts if not (ROOT / name).is_file()] == []


def headings(page: Path) -> set[str]:
    """What links to parts of a page may name, as GitHub makes it of headings."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w./-]*)?", link), link
            continue
        name, _, part = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not part or part in headings(target), link


def test_every_page_is_linked_from_the_readme_and_links_on():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = {ROOT / link.partition("#")[0] for link in LINK.findall(text)}
    assert [page.name for page in DOCS if page not in linked] == []
    for page in DOCS:
        links = {link.partition("#")[0] for link in LINK.findall(page.read_text(encoding="utf-8"))}
        assert links & ({other.name for other in DOCS} - {page.name}), page.name


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "docs" / "python.md"], ids=lambda page: page.name
)
def test_python_examples_run(page, desk):
    """As they stand, one after the other, on four small frames."""
    shown: list[int] = []
    names = {
        "frames": list(torch.rand(4, 1, 3, 12, 16) * 2 - 1),
        "more_frames": list(torch.rand(2, 1, 3, 12, 16) * 2 - 1),
        "show": lambda index, picture: shown.append(index),
    }
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    assert (desk / "here.safetensors").is_file()
    assert page.name == "README.md" or (shown == [0, 1, 2, 3] and (desk / "out.mp4").is_file())
