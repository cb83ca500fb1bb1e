"""One table of options: a field of a frozen dataclass tells its default, limits, choices and help, once.

Flags, widgets, JSON schemas and checks are all made from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import IncompatibleInputError


@dataclass(frozen=True)
class Rule:
    """What a value must be, and what it is for."""

    help: str
    """One sentence for the person who sets it, without the default."""
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


def option(
    default: Any,
    help: str,
    *,
    kind: type | None = None,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[Any] = (),
    expert: bool = False,
    step: float | None = None,
) -> Any:
    """A dataclass field with its rule; `kind` is that of the default unless this is None."""
    kind = kind or type(default)
    rule = Rule(help, kind, low, high, tuple(choices), default is None, expert, step)
    return field(default=default, metadata={"rule": rule})


def rules(cls: type) -> dict[str, Rule]:
    """The rules of a dataclass of options, by name, in order."""
    return {each.name: each.metadata["rule"] for each in fields(cls) if "rule" in each.metadata}


def check_options(options: Any) -> None:
    """Check every value against its rule; to be called from `__post_init__`.

    Raises `IncompatibleInputError` with the name, what is allowed and what came.
    """
    for name, rule in rules(type(options)).items():
        problem = _problem(getattr(options, name), rule)
        if problem:
            raise IncompatibleInputError(f"{name} as {problem}", repr(getattr(options, name)))


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
