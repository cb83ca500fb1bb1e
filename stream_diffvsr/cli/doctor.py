"""Show what is installed, which device and weights will be used, and why other weights are ignored."""

from __future__ import annotations

import argparse
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import __version__
from ..devices import available, resolve_device, resolve_dtype
from ..errors import StreamDiffVSRError
from ..flow.open import BUNDLED, open_bundled
from ..flow.raft_weights import RAFT, find_raft, hub_file, load_raft
from ..jobs.journal import work_state
from ..load import Found, download_targets, find_checkpoints, reason_ignored
from ..weights.fetch import endpoint, offline
from ..weights.find import Candidate, models_folders
from ..weights.folders import NANO, user_cache
from ..weights.released import RELEASES

PACKAGES = (
    "torch", "torchvision", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub",
    "einops", "numpy", "av", "Pillow", "tqdm", "opencv-python-headless", "opencv-python",
)  # fmt: skip


BUNDLED_MODEL = Candidate("nano", NANO, "diffvsr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    words = "Folders to search for unfinished work and, before all other folders, for models."
    parser.add_argument("folder", nargs="*", type=Path, help=words)


def run(args: argparse.Namespace) -> int:
    folders: list[Path] = args.folder
    sections = {
        "Packages": packages(),
        "Devices": devices(),
        "Weights": weights(folders),
        "Flow": flow(folders),
        "Folders": searched(folders),
        "Unfinished work": unfinished([Path.cwd(), *folders]),
    }
    print(f"stream-diffvsr {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for title, lines in sections.items():
        print(f"\n{title}")
        for line in lines:
            print(f"  {line}")
    return 0 if reason_ignored(BUNDLED_MODEL) is None else 1


def packages() -> Iterator[str]:
    """Yield each package with its version."""
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} is not installed"


def devices() -> Iterator[str]:
    """Yield each device with the number format that 'auto' selects for it; mark the device used by 'auto'."""
    chosen = resolve_device("auto")
    for name in available():
        device = resolve_device(name)
        dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
        yield f"{name}: {dtype}{', used by auto' if device == chosen else ''}"


def weights(folders: list[Path]) -> Iterator[str]:
    """Yield each checkpoint found and whether it will be used, followed by the missing released weights."""
    damage = reason_ignored(BUNDLED_MODEL)
    yield f"nano: {NANO}, {f'ignored: {damage}' if damage else 'bundled'}"
    used = {"nano"}
    for found in find_checkpoints(folders):
        yield f"{found.name}: {found.path}, {verdict(found, used)}"
        used |= {found.name} if found.problem is None else set()
    yield from (missing(name, folders) for name in RELEASES if name not in used)


def verdict(found: Found, used: set[str]) -> str:
    """Return whether a checkpoint will be used, given the names already taken by earlier ones."""
    if found.problem:
        return f"ignored: {found.problem}"
    return (
        f"complete, but shadowed by the {found.name} above"
        if found.name in used
        else "complete, will be used"
    )


def missing(name: str, folders: list[Path]) -> str:
    """Return a line saying that released weights are missing, and where they would be downloaded."""
    target, release = download_targets(name, folders)[0], RELEASES[name]
    there = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = f"{release.gigabytes} GB needed, {shutil.disk_usage(there).free / 1e9:.1f} GB free"
    how = "but HF_HUB_OFFLINE forbids it" if offline() else f"from {endpoint()}/{release.repository}"
    return f"{name}: not found; would be downloaded to {target} ({free}), {how}"


def flow(folders: list[Path]) -> Iterator[str]:
    """Yield the location of each flow estimator's weights."""
    for name in RAFT:
        yield f"{name}: {raft(name, models_folders(folders))}"
    try:
        open_bundled()
        yield f"bundled: {BUNDLED}"
    except StreamDiffVSRError as error:
        yield f"bundled: {error}"
    try:
        import cv2

        yield f"dis: OpenCV {cv2.__version__}"
    except ImportError:
        yield "dis: needs OpenCV (pip install opencv-python-headless)"


def raft(name: str, folders: list[Path]) -> str:
    """Return where a RAFT network's weights are or would be downloaded, or why they are ignored."""
    path = find_raft(name, folders)
    if path is None:
        return f"not found; would be downloaded to {hub_file(name)}"
    try:
        load_raft(name, path)
    except StreamDiffVSRError as error:
        return f"ignored: {error}"
    return str(path)


def searched(folders: list[Path]) -> Iterator[str]:
    """Yield the folders that were searched, in order, and the folder in which small files are cached."""
    for folder in models_folders(folders):
        yield f"searched {folder}{'' if folder.is_dir() else ' (does not exist)'}"
    yield f"cache {user_cache()}"


def unfinished(folders: list[Path]) -> Iterator[str]:
    """Yield each work folder of an unfinished job, with its size and what can be done with it."""
    found = sorted({path.resolve() for folder in folders for path in folder.glob("*.parts")})
    for path in filter(Path.is_dir, found):
        if (state := work_state(path)) is not None:
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            yield f"{path}: {size / 1e6:.1f} MB, {state}"
    yield f"searched {', '.join(map(str, folders))}"
