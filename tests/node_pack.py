"""The node pack, loaded as ComfyUI loads it: by file location, under a name that is no identifier."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def load_pack(folder: Path = ROOT) -> ModuleType:
    """Execute the pack's root module; its folder may have any name."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def part(pack: ModuleType, name: str) -> ModuleType:
    """A submodule of a loaded pack, such as 'nodes.files'."""
    return importlib.import_module(f"{pack.__name__}.{name}")
