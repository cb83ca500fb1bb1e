"""Answers the service's questions before it accepts a job; questions and answers are lines of JSON.

    {"about": true}                     -> {"families": ..., "models": ..., "devices": ..., ...}
    {"upscale": ["in.mp4", "-o", ...]}  -> {"code": 0, "facts": {...}}, or {"code": 2, "message": "..."}

It runs as a separate process (`python -m stream_diffvsr.cli.checks`), because a hostile file may crash the
process that opens it, and because torch needs hundreds of megabytes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..devices import available
from ..errors import StreamDiffVSRError
from ..jobs.job import VideoJob
from ..load import FAMILIES, family_of, find_checkpoints, resolve
from ..media import pictures
from ..media.codecs import CONTAINERS
from ..memory import free_memory
from ..options import Rule, defaults, json_schema, rules
from ..weights.fetch import offline
from ..weights.find import registered
from ..weights.released import RELEASES
from . import upscale
from .main import parse

OF_THE_LOADER = ("dtype", "quantize", "runtime", "provider", "attention", "flow", "threads")
"""Options of a job that determine how the model is opened."""
NUMBER = {"type": ["integer", "null"], "minimum": 1}
"""JSON schema of those options whose values are numbers rather than names."""
LOCAL = ("overwrite", "restart", "read_ahead", "compare")
"""Options that the service does not offer to its clients."""
SCENE_CUT = r"^(auto|off|\d{1,3}(\.\d{1,6})?)$"
"""Pattern of the values that clients may set for this option; the command also accepts a CSV file."""


def main() -> None:
    """Answer questions until standard input ends."""
    # Output that libraries print must not mix with the answers.
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        answer = capabilities() if "about" in asked else check(asked["upscale"])
        print(json.dumps(answer), file=answers, flush=True)


def check(arguments: Sequence[str]) -> dict[str, Any]:
    """Check the arguments of `upscale` as the command does before it opens a model; return the result."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parse(["upscale", *arguments])
        return {"code": 0, "facts": upscale.check(args)}
    except SystemExit:
        message = said.getvalue().partition(": ")[2].partition("; '")[0]
        return {"code": 2, "message": message}
    except StreamDiffVSRError as error:
        return {"code": 2, "message": str(error)}
    except Exception as error:  # caused by a crafted file
        return {"code": 2, "message": f"the file cannot be read ({type(error).__name__}: {error})"}


def capabilities() -> dict[str, Any]:
    """Return the models, devices, options and file formats that this machine offers."""
    job = [name for name, rule in rules(VideoJob).items() if name not in LOCAL and not _names_file(rule)]
    schema = json_schema(VideoJob, job)
    schema["properties"]["scene_cut"] |= {
        "pattern": SCENE_CUT,
        "description": "How to detect scenes (the model starts each of them afresh): auto, off, or a "
        "threshold from 0 to 255 (auto uses 27).",
    }
    families = {name: _family(name) for name in FAMILIES}
    return {
        "job": {"schema": schema, "options": _option_described(VideoJob, job)},
        "loader": _loader(),
        "families": families,
        "models": models(),
        "devices": [device(name) for name in available()],
        "pictures": list(pictures.SUFFIXES),
        "written": {"videos": list(CONTAINERS), "images": list(pictures.WRITABLE)},
    }


def _family(name: str) -> dict[str, Any]:
    options = FAMILIES[name].options
    named = [option for option, rule in rules(options).items() if not (_names_file(rule) or rule.hidden)]
    return {
        "title": FAMILIES[name].title,
        "presets": list(FAMILIES[name].presets),
        "schema": json_schema(options, named),
        "options": _option_described(options, named),
    }


def _names_file(rule: Rule) -> bool:
    """Whether an option's value is a path, which clients must not set."""
    return "FILE" in (rule.metavar or "") or "FOLDER" in (rule.metavar or "")


def _option_described(cls: type, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Describe how each option is shown and passed to the command."""
    table, default = rules(cls), defaults(cls)
    return {
        name: {
            "flag": (table[name].flag or name).replace("_", "-"),
            "switch": table[name].kind is bool and table[name].parse is None,
            "default": default[name] if isinstance(default[name], bool) else None,
            "expert": table[name].expert,
            "group": table[name].group,
        }
        for name in names
    }


def _loader() -> dict[str, Any]:
    """Describe the command's options that determine how the model is opened."""
    parser = argparse.ArgumentParser()
    upscale.add_arguments(parser)
    made = {each.dest: each for each in parser._actions if each.dest in OF_THE_LOADER}
    properties: Mapping[str, Any] = {
        name: {
            **({"type": "string", "enum": list(each.choices)} if each.choices else NUMBER),
            "description": (each.help or "").partition(" Default:")[0],
            "default": each.default,
        }
        for name, each in made.items()
    }
    told = {name: {"flag": name, "switch": False, "expert": True, "group": "model"} for name in made}
    return {
        "schema": {"type": "object", "properties": properties, "additionalProperties": False},
        "options": told,
    }


def models() -> list[dict[str, Any]]:
    """Describe every selectable model: the bundled model, the released models, and any in models folders."""
    found = {"nano": _model("nano", "diffvsr", here=True)}
    for name, release in RELEASES.items():
        here = resolve(name) is not None
        found[name] = _model(name, release.family, here=here)
        if not here:
            found[name] |= {"download_gigabytes": release.gigabytes, "can_download": not offline()}
    for each in find_checkpoints():
        if each.problem is None and each.name not in found:
            found[each.name] = _model(each.name, family_of(each.path) or "diffvsr", here=True)
    for path in (path for folder in registered() if folder.is_dir() for path in sorted(folder.iterdir())):
        if path.is_file() and path.name not in found and FAMILIES["image"].recognise(path):
            found[path.name] = {**_model(path.name, "image", here=True), "file": str(path)}
    return list(found.values())


def _model(name: str, family: str, *, here: bool) -> dict[str, Any]:
    return {"name": name, "family": family, "title": FAMILIES[family].title, "here": here}


def device(name: str) -> dict[str, Any]:
    """Describe a device, with its memory in bytes."""
    kind = torch.device(name)
    if kind.type == "cuda":
        free, total = torch.cuda.mem_get_info(kind)
        title = torch.cuda.get_device_name(kind)
    else:
        import psutil

        free, total, title = free_memory(kind), psutil.virtual_memory().total, name
    return {"name": name, "title": title, "total": total, "free": free, "used": total - free}


if __name__ == "__main__":
    main()
