"""Options, each defined once as a dataclass field with its default, limits, choices and help text.

Flags, widgets, JSON schemas and checks are all generated from these fields:

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
"""Title of the last group of flags, which contains the expert options that have no other group."""


@dataclass(frozen=True)
class Rule:
    """The valid values of an option, and how it is presented to the user."""

    help: str
    """Help text for the user, without the default."""
    kind: type
    """One of bool, int, float and str."""
    low: float | None = None
    high: float | None = None
    """Inclusive limits; None means no limit."""
    choices: tuple[Any, ...] = ()
    optional: bool = False
    """Whether None is also a valid value."""
    expert: bool = False
    """Whether beginners can ignore the option."""
    step: float | None = None
    """Amount by which the widget's arrows change the value."""
    usual: tuple[float, float] | None = None
    """Limits of the widget, for an option whose own limits are wider or missing."""
    unset: Any = None
    """Widget value that represents None, since the value of a widget cannot be None."""
    multiline: bool = False
    """Whether the widget accepts several lines of text."""
    parse: Callable[[str], Any] | None = None
    """Function that converts text to a value of another kind, which the options class must check itself."""
    flag: str = ""
    """Name of the flag, if it differs from the name of the field."""
    metavar: str | None = None
    group: str = ""
    """Title under which the flag is listed."""
    unset_help: str = ""
    """Meaning of the default None, for the help text and the tooltip."""
    hidden: bool = False
    """Whether the option is set only by jobs; it has no flag, and schemas include it only on request."""


def option(
    default: Any,
    help: str,
    *,
    kind: type | None = None,
    choices: Iterable[Any] = (),
    **rule: Any,
) -> Any:
    """Return a dataclass field with its `Rule`; `kind` defaults to the type of `default`."""
    made = Rule(help, kind or type(default), choices=tuple(choices), optional=default is None, **rule)
    return field(default=default, metadata={"rule": made})


def rules(cls: type) -> dict[str, Rule]:
    """Return the rule of each option by name, in the order of the fields."""
    return {each.name: each.metadata["rule"] for each in fields(cls) if "rule" in each.metadata}


def defaults(cls: type) -> dict[str, Any]:
    """Return the default of each option by name."""
    return {each.name: each.default for each in fields(cls) if "rule" in each.metadata}


def check_options(options: Any) -> None:
    """Check every value against its rule; call this from `__post_init__`.

    Raises `IncompatibleInputError` with the option's name, its allowed values and the given value.
    """
    for name, rule in rules(type(options)).items():
        if rule.parse:
            continue
        problem = _problem(getattr(options, name), rule)
        if problem:
            raise IncompatibleInputError(f"{name} must be {problem}, not {getattr(options, name)!r}")


def _problem(value: object, rule: Rule) -> str | None:
    """Return a description of the allowed values, or None if `value` is one of them."""
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
    """Create options from JSON values like those of `to_json`; missing options keep their defaults.

    Raises `IncompatibleInputError` for an unknown name or a value that is not allowed.
    """
    table = rules(cls)
    if unknown := sorted(values.keys() - table.keys()):
        raise IncompatibleInputError(
            f"there is no option {', '.join(unknown)}; the options are {', '.join(table)}"
        )
    return cls(**{name: _from_text(name, table[name], value) for name, value in values.items()})


def to_json(options: Any) -> dict[str, Any]:
    """Return the options as JSON values by name, from which `from_json` creates the same options."""
    values = {name: (rule, getattr(options, name)) for name, rule in rules(type(options)).items()}
    return {
        name: str(value) if rule.parse and value is not None else value
        for name, (rule, value) in values.items()
    }


def json_schema(cls: type, only: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the JSON schema of an options class, or only of the options named in `only`."""
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
    """Add a flag for every option, in groups with these `titles`, and return the groups by title.

    An option without a group is added to the parser itself or, if it is for experts, to a final group. A
    flag sets an attribute only if it is used; `given_options` collects these attributes. An option that
    several classes share becomes one flag, with the help text of the first class and the choices of all.
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
    """Add the flag for one option, and return the parser's action for it."""
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
    """Return the options of a class that were set on the command line."""
    return {name: value for name, value in vars(args).items() if name in rules(cls)}


def with_preset(
    presets: Mapping[str, Mapping[str, Any]], name: str, own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a family's option values: those of the preset called `name`, overridden by those in `own`."""
    if name not in presets:
        raise IncompatibleInputError(f"preset must be one of {', '.join(presets)}, not {name!r}")
    return {**presets[name], **own}


def widgets(cls: type, names: Iterable[str]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the ComfyUI widgets for these options by name."""
    return {name: _widget(rules(cls)[name], defaults(cls)[name]) for name in names}


def from_widgets(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert widget values to fields of `cls`; an optional field becomes None if its value is `unset`."""
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
    """Parse the text of an option that has `parse`; return any other value unchanged."""
    if rule.parse is None or not isinstance(value, str):
        return value
    try:
        return rule.parse(value)
    except (ValueError, ArithmeticError) as error:
        raise IncompatibleInputError(
            f"{name} must be given as {rule.metavar or 'text'}, not {value!r}"
        ) from error
