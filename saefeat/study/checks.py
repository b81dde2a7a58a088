"""What records of the study have to be."""

import math
from collections.abc import Sequence


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
