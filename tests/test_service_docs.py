"""What the pages about the service name is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml

from stream_diffvsr.options import rules
from stream_diffvsr.service.settings import PREFIX, Settings

DOCS = Path(__file__).parent.parent / "docs"
SETTINGS = {PREFIX + name.upper() for name in rules(Settings)}
INSTRUCTIONS = {
    *("FROM", "ARG", "WORKDIR", "COPY", "RUN"),
    *("USER", "ENV", "VOLUME", "EXPOSE", "HEALTHCHECK", "CMD"),
}


def test_dockerfile() -> None:
    text = (DOCS / "docker" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0][0] == "FROM" and {line[0] for line in lines} <= INSTRUCTIONS
    for line in lines:
        if line[0] == "COPY":
            assert all((DOCS.parent / name).exists() for name in line[1:-1]), line
    assert set(re.findall(rf"{PREFIX}\w+", text)) <= SETTINGS
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', text)
    project = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in project for extra in extras.split(","))


def test_compose() -> None:
    composed = yaml.safe_load((DOCS / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    services = composed["services"]
    build = services["stream-diffvsr"]["build"]
    assert (DOCS / "docker" / build["context"] / build["dockerfile"]).resolve().is_file()
    for service in services.values():
        assert service.keys() & {"image", "build"}
        assert set(service.get("depends_on", ())) <= services.keys()
        assert {volume.split(":")[0] for volume in service["volumes"]} <= composed["volumes"].keys()
        assert {name for name in service["environment"] if name.startswith(PREFIX)} <= SETTINGS
        # Only to this machine: what faces the world is the owner's choice.
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_page_names_real_options() -> None:
    text = (DOCS / "service.md").read_text(encoding="utf-8")
    named = {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)`", text.partition("## REST")[0])}
    assert named == set(rules(Settings))
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        ast.parse(code)
