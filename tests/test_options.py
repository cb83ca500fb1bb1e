"""The table of options: flags, widgets, JSON and checks all say the same."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path

import pytest

from stream_diffvsr import IncompatibleInputError, UpscaleOptions
from stream_diffvsr.jobs.job import VideoJob
from stream_diffvsr.options import (
    EXPERTS,
    add_flags,
    check_options,
    from_json,
    from_widgets,
    given_options,
    json_schema,
    option,
    rules,
    to_json,
    widgets,
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    steps: int | None = option(None, "Steps.", kind=int, low=1, high=9, usual=(1, 5), unset=0, flag="n")
    scale: float = option(1.0, "100 % of it.", choices=(1.0, 0.5), group="speed")
    name: str = option("", "A name.", expert=True)
    on: bool = option(True, "Whether.")
    off: bool = option(False, "Whether not.")
    rate: Fraction | None = option(None, "Rate.", parse=Fraction, metavar="RATE")

    def __post_init__(self) -> None:
        check_options(self)


def parse(*arguments: str) -> Sample:
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample, titles=("speed",))
    return Sample(**given_options(parser.parse_args(arguments), Sample))


def test_flags() -> None:
    assert parse() == Sample()
    every = parse("--n", "3", "--scale", "0.5", "--name", "x", "--no-on", "--off", "--rate", "24000/1001")
    assert every == Sample(steps=3, scale=0.5, name="x", on=False, off=True, rate=Fraction(24000, 1001))


@pytest.mark.parametrize("arguments", [["--n", "x"], ["--scale", "2"], ["--rate", "1/0"], ["--rate", "x"]])
def test_flags_that_do_not_fit(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and arguments[0] in said and arguments[1] in said


def test_help_is_grouped_and_tells_defaults() -> None:
    parser = argparse.ArgumentParser()
    groups = add_flags(parser, Sample, titles=("speed", "input"))
    assert list(groups) == ["speed", "input", EXPERTS]
    text = parser.format_help().partition("options:")[2]
    assert "100 % of it. Default: 1.0." in text
    assert (
        text.index("speed:") < text.index("--scale {") < text.index(f"{EXPERTS}:") < text.index("--name NAME")
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 9, not 0"),
        ({"steps": True}, "whole number"),
        ({"steps": 2.0}, "whole number"),
        ({"scale": 0.7}, "one of 1.0, 0.5, not 0.7"),
        ({"scale": float("nan")}, "scale must be one of"),
        ({"name": 3}, "name must be text, not 3"),
        ({"on": 1}, "on must be True or False"),
        ({"on": None}, "on must be True or False"),
    ],
)
def test_checks(values: dict, said: str) -> None:
    with pytest.raises(IncompatibleInputError, match=said):
        Sample(**values)
    with pytest.raises(IncompatibleInputError):
        from_json(Sample, values)


def test_json_there_and_back() -> None:
    for sample in (Sample(), parse("--n", "3", "--no-on", "--rate", "30000/1001")):
        assert from_json(Sample, json.loads(json.dumps(to_json(sample)))) == sample
    with pytest.raises(IncompatibleInputError, match="no option colour"):
        from_json(Sample, {"colour": 1})
    with pytest.raises(IncompatibleInputError, match="rate must be given as RATE"):
        from_json(Sample, {"rate": "soon"})


def test_json_schema() -> None:
    schema = json_schema(Sample)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["steps"] == {
        "type": ["integer", "null"],
        "description": "Steps.",
        "default": None,
        "minimum": 1,
        "maximum": 9,
    }
    assert schema["properties"]["scale"]["enum"] == [1.0, 0.5]
    assert list(json_schema(Sample, ["on"])["properties"]) == ["on"]


def test_widgets_there_and_back() -> None:
    made = widgets(Sample, ("steps", "scale", "name", "on"))
    assert made["steps"] == ("INT", {"default": 0, "min": 0, "max": 5, "tooltip": "Steps."})
    assert made["scale"] == ([1.0, 0.5], {"default": 1.0, "tooltip": "100 % of it."})
    assert made["name"] == ("STRING", {"default": "", "tooltip": "A name.", "advanced": True})
    start = {name: about["default"] for name, (_, about) in made.items()}
    assert Sample(**from_widgets(Sample, start)) == Sample()
    assert from_widgets(Sample, {"steps": 4, "scale": 1}) == {"steps": 4, "scale": 1.0}


@pytest.mark.parametrize("cls", [UpscaleOptions, VideoJob])
def test_every_option_is_told_and_its_default_fits(cls: type) -> None:
    for name, rule in rules(cls).items():
        assert rule.help.endswith(".") and "  " not in rule.help, name
    json.dumps(json_schema(cls))
    parser = argparse.ArgumentParser()
    add_flags(parser, cls, titles=())
    assert given_options(parser.parse_args([]), cls) == {}


def test_all_options_of_the_family_are_in_the_table() -> None:
    assert set(rules(UpscaleOptions)) == {each.name for each in fields(UpscaleOptions)}
    assert from_json(UpscaleOptions, to_json(UpscaleOptions(seed=3))) == UpscaleOptions(seed=3)


def test_a_job_reads_its_options_as_the_command_line_does() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, VideoJob, titles=())
    text = "--start 0:01:02.5 --end 12.5s --fps 29.97 --target 640x360 --no-audio --state-out s.safetensors"
    job = VideoJob(
        source=Path("a"), output=Path("b"), **given_options(parser.parse_args(text.split()), VideoJob)
    )
    assert (job.start, job.end, job.rate) == (Fraction(125, 2), Fraction(25, 2), Fraction(2997, 100))
    assert (job.target, job.audio, job.state_out) == ((640, 360), False, Path("s.safetensors"))


def test_what_is_read_from_text_may_be_a_number_in_json() -> None:
    """A frame's index, a rate."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema(VideoJob, ["start", "end", "rate"])
    jsonschema.validate({"start": 3, "end": "2s", "rate": 29.97}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"start": True}, schema)
