"""Download released weights, skipping files that are already there."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import IncompatibleInputError, ModelNotFoundError
from ..flow.raft_weights import download_raft, find_raft, load_raft
from ..load import download, resolve
from ..weights.find import models_folders
from ..weights.released import RELEASED, RELEASES
from .output import download_bar, fail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=RELEASED,
        choices=RELEASES,
        help=f"{', '.join(f'{name} ({each.gigabytes} GB)' for name, each in RELEASES.items())}. "
        f"Default: {RELEASED}.",
    )
    parser.add_argument("--folder", type=Path, help="Models folder to use instead of the default.")
    parser.add_argument("--revision", help="Branch, tag or commit of the published repository.")


def run(args: argparse.Namespace) -> int:
    folders = [args.folder] if args.folder else []
    there = already_whole(args.model, args.folder)
    if there and args.revision:
        raise IncompatibleInputError(
            f"{there} already contains a complete {args.model}; to download revision {args.revision!r}, "
            "rename that folder, or choose another folder with --folder",
        )
    try:
        path = there or download_with_bar(args.model, folders, args.revision)
        print(f"{args.model}: {path}")
        if RELEASES[args.model].family == "diffvsr":
            # Also get RAFT's weights, so that the model runs without a connection from now on.
            print(f"raft_large: {bring_raft([path, path.parent, *models_folders(folders)])}")
    except ModelNotFoundError as error:
        return fail(args, str(error), 1)
    return 0


def already_whole(name: str, folder: Path | None) -> Path | None:
    """Return the folder with a release's complete weights, or None; if `folder` is given, look only there."""
    path = resolve(name, [folder] if folder else [])
    inside = path and (folder is None or folder.resolve() in [path.resolve(), *path.resolve().parents])
    return path if inside else None


def download_with_bar(name: str, folders: list[Path], revision: str | None) -> Path:
    with download_bar() as on_progress:
        return download(name, folders, revision=revision, on_progress=on_progress)


def bring_raft(folders: list[Path]) -> Path:
    """Find or download RAFT's weights, check them, and return their path."""
    path = find_raft("raft_large", folders) or download_raft("raft_large")
    load_raft("raft_large", path)
    return path
