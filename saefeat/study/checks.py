"""What records of the study have to be."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any


def checked_fields(cls: type, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts, if they are those of a record of this class."""
    if not isinstance(facts, Mapping):
        raise ValueError(f"A {cls.__name__} is an object with named fields, got {facts!r}.")
    names = {one.name for one in fields(cls)}
    if set(facts) != names:
        raise ValueError(
            f"A {cls.__name__} has other fields than these: missing {sorted(names - set(facts))}, "
            f"unknown {sorted(set(facts) - names)}. The file is of another version, or damaged."
        )
    return dict(facts)


def check_among(record: object, **choices: Sequence[str]) -> None:
    """Each named field is one of those known."""
    for name, known in choices.items():
        if getattr(record, name) not in known:
            raise ValueError(f"{name} is one of {list(known)}, got {getattr(record, name)!r}.")


def check_above_zero(record: object, *names: str) -> None:
    """Each named field is above 0."""
    for name in names:
        if not getattr(record, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(record, name)}.")


def check_finite(record: object, *names: str) -> None:
    """Each named field is a finite number."""
    for name in names:
        if not math.isfinite(getattr(record, name)):
            raise ValueError(f"{name} must be a finite number, got {getattr(record, name)}.")


def check_distinct(places: Sequence[tuple[object, ...]]) -> None:
    """No place is there twice."""
    twice = [place for place in dict.fromkeys(places) if places.count(place) > 1]
    if twice:
        raise ValueError(f"{twice[0]} was observed twice. Give each observation once.")
