"""One table of options: a field of a frozen dataclass tells its default, limits, choices and help, once.

Flags, widgets, JSON schemas and checks are all made from it:

    @dataclass(frozen=True, kw_only=True)
    class Options:
        seed: int = option(0, "Noise seed.", low=0)
        tile_size: int | None = option(None, "Side of a tile.", kind=int, group="memory", unset=0)

        def __post_init__(self) -> None:
            check_options(self)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, TypeVar

from .errors import IncompatibleInputError, StreamDiffVSRError

Made = TypeVar("Made")

EXPERTS = "for experts"
"""Title of the flags without a group that a beginner can leave alone; it comes last."""


@dataclass(frozen=True)
class Rule:
    """What a value must be, and what it is for."""

    help: str
    """Sentences for the person who sets it, without the default."""
    kind: type
    """bool, int, float or str."""
    low: float | None = None
    high: float | None = None
    """Limits, both included; None: none."""
    choices: tuple[Any, ...] = ()
    optional: bool = False
    """Whether None is a value, too."""
    expert: bool = False
    """Whether a beginner can leave it alone."""
    step: float | None = None
    """Of a widget's arrows."""
    usual: tuple[float, float] | None = None
    """Limits of a widget, where those of the value are wider or missing."""
    unset: Any = None
    """What stands for None in a widget, which has no None."""
    multiline: bool = False
    """Whether its widget has room for several lines."""
    parse: Callable[[str], Any] | None = None
    """Reads it from text, for what is none of the four kinds; such a value is checked by its owner."""
    flag: str = ""
    """Name of its flag, where that is not the field's own."""
    metavar: str | None = None
    group: str = ""
    """Title under which its flag is listed."""
    unset_help: str = ""
    """What a default of None means, for the help and the tooltip."""
    hidden: bool = False
    """Whether jobs alone set it: it has no flag, and stands in no schema that does not name it."""


def option(
    default: Any,
    help: str,
    *,
    kind: type | None = None,
    choices: Iterable[Any] = (),
    **rule: Any,
) -> Any:
    """A dataclass field with its `Rule`; `kind` is that of the default unless this is given."""
    made = Rule(help, kind or type(default), choices=tuple(choices), optional=default is None, **rule)
    return field(default=default, metadata={"rule": made})


def rules(cls: type) -> dict[str, Rule]:
    """The rules of a dataclass of options, by name, in order."""
    return {each.name: each.metadata["rule"] for each in fields(cls) if "rule" in each.metadata}


def defaults(cls: type) -> dict[str, Any]:
    """The default of each option, by name."""
    return {each.name: each.default for each in fields(cls) if "rule" in each.metadata}


def check_options(options: Any) -> None:
    """Check every value against its rule; to be called from `__post_init__`.

    Raises `IncompatibleInputError` with the name, what is allowed and what came.
    """
    for name, rule in rules(type(options)).items():
        if rule.parse:
            continue
        problem = _problem(getattr(options, name), rule)
        if problem:
            raise IncompatibleInputError(f"{name} must be {problem}, not {getattr(options, name)!r}")


def _problem(value: object, rule: Rule) -> str | None:
    """What a value should have been; None where it is right."""
    if value is None and rule.optional:
        return None
    if rule.choices:
        same = [choice for choice in rule.choices if choice == value and type(choice) is type(value)]
        fits = bool(same) or (rule.kind is float and not isinstance(value, bool) and value in rule.choices)
        return None if fits else f"one of {', '.join(map(repr, rule.choices))}"
    if rule.kind in (bool, str):
        return None if isinstance(value, rule.kind) else {bool: "True or False", str: "text"}[rule.kind]
    low = -math.inf if rule.low is None else rule.low
    high = math.inf if rule.high is None else rule.high
    kinds = (int, float) if rule.kind is float else int
    if (
        isinstance(value, kinds)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and low <= value <= high
    ):
        return None
    limits = {
        (False, False): "",
        (True, False): f" of at least {rule.low}",
        (False, True): f" of at most {rule.high}",
        (True, True): f" from {rule.low} to {rule.high}",
    }[rule.low is not None, rule.high is not None]
    return ("a whole number" if rule.kind is int else "a finite number") + limits


def from_json(cls: type[Made], values: Mapping[str, Any]) -> Made:
    """Options from their JSON values, such as `to_json` made; what is missing has its default.

    Raises `IncompatibleInputError` for an unknown name or a value that is not allowed.
    """
    table = rules(cls)
    if unknown := sorted(values.keys() - table.keys()):
        raise IncompatibleInputError(f"there is no option {', '.join(unknown)}; there are {', '.join(table)}")
    return cls(**{name: _from_text(name, table[name], value) for name, value in values.items()})


def to_json(options: Any) -> dict[str, Any]:
    """JSON values of options by name; `from_json` makes the same options of them."""
    values = {name: (rule, getattr(options, name)) for name, rule in rules(type(options)).items()}
    return {
        name: str(value) if rule.parse and value is not None else value
        for name, (rule, value) in values.items()
    }


def json_schema(cls: type, only: Iterable[str] | None = None) -> dict[str, Any]:
    """The JSON schema of a class of options, or of those named in `only`."""
    names, table, default = {bool: "boolean", int: "integer", float: "number"}, rules(cls), defaults(cls)
    properties = {}
    for name in [name for name in table if not table[name].hidden] if only is None else only:
        rule = table[name]
        kinds = ["string", "number"] if rule.parse else [names.get(rule.kind, "string")]
        kinds += ["null"] if rule.optional else []
        facts = {
            "type": kinds if len(kinds) > 1 else kinds[0],
            "description": rule.help,
            "default": default[name] if default[name] is None or not rule.parse else str(default[name]),
            "minimum": rule.low,
            "maximum": rule.high,
            "enum": [*rule.choices, *([None] if rule.optional else [])] if rule.choices else None,
        }
        properties[name] = {
            key: value for key, value in facts.items() if value is not None or key == "default"
        }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def add_flags(parser: argparse.ArgumentParser, *classes: type, titles: Sequence[str]) -> dict[str, Any]:
    """Add the flag of every option, in groups with these `titles`; returns the groups by title.

    What has no group goes to the parser itself, or, where it is for experts, to a group of its own at the
    end. A flag that was not given leaves no attribute; `given_options` finds the others. A name that several
    classes have is one flag, with the help of the first and the choices of all.
    """
    groups: dict[str, Any] = {title: parser.add_argument_group(title) for title in (*titles, EXPERTS)}
    made: dict[str, argparse.Action] = {}
    for cls in classes:
        for name, rule in rules(cls).items():
            if rule.hidden:
                continue
            if name in made:
                choices = dict.fromkeys([*(made[name].choices or ()), *rule.choices])
                made[name].choices = list(choices) or None
                continue
            title = EXPERTS if rule.expert and not rule.group else rule.group
            made[name] = add_flag(groups.get(title, parser), cls, name)
    return groups


def add_flag(
    group: argparse._ActionsContainer,  # pyright: ignore[reportPrivateUsage]
    cls: type,
    name: str,
) -> argparse.Action:
    """Add the flag of one option."""
    rule, default = rules(cls)[name], defaults(cls)[name]
    flag = "--" + (rule.flag or name).replace("_", "-")
    told = rule.unset_help or ("" if default is None or rule.kind is bool else str(default))
    about: dict[str, Any] = {
        "dest": name,
        "default": argparse.SUPPRESS,
        "help": (rule.help + (f" Default: {told}." if told else "")).replace("%", "%%"),
    }
    if rule.kind is bool and rule.parse is None:
        action = argparse.BooleanOptionalAction if default else "store_true"
        return group.add_argument(flag, action=action, **about)
    about["type"] = partial(_from_argument, name, rule) if rule.parse else rule.kind
    return group.add_argument(flag, choices=rule.choices or None, metavar=rule.metavar, **about)


def _from_argument(name: str, rule: Rule, text: str) -> Any:
    try:
        return _from_text(name, rule, text)
    except StreamDiffVSRError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def given_options(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The options of a class that the command line names."""
    return {name: value for name, value in vars(args).items() if name in rules(cls)}


def with_preset(
    presets: Mapping[str, Mapping[str, Any]], name: str, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of a family's options: those of a preset, and `own`, which wins."""
    if name not in presets:
        raise IncompatibleInputError(f"preset must be one of {', '.join(presets)}, not {name!r}")
    return {**presets[name], **own}


def widgets(cls: type, names: Iterable[str]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """ComfyUI's widgets for these options, by name."""
    return {name: _widget(rules(cls)[name], defaults(cls)[name]) for name in names}


def from_widgets(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the values of widgets mean as fields of `cls`: None where a widget stands at its `unset`."""
    table = rules(cls)
    return {
        name: None
        if table[name].optional and value == table[name].unset
        else (float(value) if table[name].kind is float else value)
        for name, value in values.items()
    }


def _widget(rule: Rule, default: Any) -> tuple[Any, dict[str, Any]]:
    unset = f" {rule.unset}: {rule.unset_help}." if rule.optional and rule.unset_help else ""
    about: dict[str, Any] = {"default": rule.unset if default is None else default}
    about["tooltip"] = rule.help + unset
    if rule.expert:
        about["advanced"] = True
    if rule.choices:
        return [*([rule.unset] if rule.optional else []), *rule.choices], about
    if rule.kind is str:
        return "STRING", {**about, **({"multiline": True} if rule.multiline else {})}
    if rule.kind is bool:
        return "BOOLEAN", about
    low, high = rule.usual or (rule.low, rule.high)
    limits = {"min": rule.unset if rule.optional else low, "max": high, "step": rule.step}
    about |= {name: value for name, value in limits.items() if value is not None}
    return {int: "INT", float: "FLOAT"}[rule.kind], about


def _from_text(name: str, rule: Rule, value: Any) -> Any:
    """The value of a `parse`d option from its text; any other as it is."""
    if rule.parse is None or not isinstance(value, str):
        return value
    try:
        return rule.parse(value)
    except (ValueError, ArithmeticError) as error:
        raise IncompatibleInputError(
            f"{name} must be given as {rule.metavar or 'text'}, not {value!r}"
        ) from error
