"""What JSON holds as Python objects, each value checked against the type that it should have."""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

T = TypeVar("T")
_ABSENT = object()


def from_json(owner: type[T], value: object, where: object) -> T:
    """A dataclass or TypedDict made of a JSON object.

    Lists become tuples, texts paths and objects dataclasses where the annotations say so.

    Args:
        owner: The dataclass, or TypedDict.
        value: What JSON holds.
        where: The file, as errors name it.

    Raises:
        ValueError: It is no object, a field is unknown or missing, or a value is of another type
            than its field or is no finite number of 64 bits.
    """
    given = mapping(value, where)
    hints = get_type_hints(owner)
    for name in given:
        if name not in hints:
            raise ValueError(
                f"{where} has the unknown key {_shown(name)} for {owner.__name__}. It is damaged, "
                "or another version of saefeat wrote it."
            )
    for name in _required(owner):
        if name not in given:
            raise ValueError(f"{where} lacks the key {name!r} of {owner.__name__}; it is damaged.")
    return owner(**{name: fitted(one, hints[name], name, where) for name, one in given.items()})


def _required(owner: type[Any]) -> list[str]:
    if is_typeddict(owner):
        return sorted(owner.__required_keys__)
    return [
        one.name
        for one in fields(owner)
        if one.default is MISSING and one.default_factory is MISSING
    ]


def entry(
    given: Mapping[str, Any], name: str, wanted: Any, where: object, default: Any = _ABSENT
) -> Any:
    """One value of a JSON object, of the type that is wanted.

    Raises:
        ValueError: It is of another type, or absent where there is no `default`.
    """
    if name not in given:
        if default is _ABSENT:
            raise ValueError(f"{where} lacks the key {name!r}.")
        return default
    return fitted(given[name], wanted, name, where)


def mapping(value: object, where: object) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} should hold a JSON object, found {_shown(value)}.")
    return value


def fitted(value: object, wanted: Any, name: str, where: object) -> Any:
    """A value as an annotation wants it.

    Raises:
        ValueError: It does not fit.
    """
    origin, arguments = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return value
    if is_dataclass(wanted) or is_typeddict(wanted):
        return from_json(cast("type[Any]", wanted), value, f"{name} in {where}")
    if origin in (Union, UnionType):
        fitting = [one for one in arguments if _is_of_kind(value, one)]
        if fitting:
            return fitted(value, fitting[0], name, where)
    elif _is_of_kind(value, wanted):
        if isinstance(value, list | tuple):
            open_ended = origin is list or arguments[-1] is Ellipsis
            kinds = arguments[:1] * len(value) if open_ended else arguments
            if len(kinds) == len(value):
                items = (
                    fitted(one, kind, f"{name}[{number}]", where)
                    for number, (one, kind) in enumerate(zip(value, kinds, strict=True))
                )
                return origin(items)
        elif isinstance(value, dict):
            return {
                fitted(key, arguments[0], f"a key of {name}", where): fitted(
                    one, arguments[1], f"{name}[{_shown(key)}]", where
                )
                for key, one in value.items()
            }
        else:
            return Path(cast("str", value)) if wanted is Path else value
    text = wanted.__name__ if isinstance(wanted, type) and not arguments else str(wanted)
    raise ValueError(f"{name} in {where} should be {text}, found {_shown(value)}.")


def _is_of_kind(value: object, wanted: Any) -> bool:
    """Whether the outermost type is right; True and False are no numbers, NaN is none either."""
    origin = get_origin(wanted)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(wanted))
    if wanted is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if wanted is float:
        return type(value) in (int, float) and abs(cast("float", value)) <= sys.float_info.max
    if wanted in (None, NoneType):
        return value is None
    if origin in (list, tuple):
        return isinstance(value, list | tuple)
    if origin is dict or is_dataclass(wanted) or is_typeddict(wanted):
        return isinstance(value, dict)
    return type(value) is (str if wanted is Path else wanted)


def _shown(value: object) -> str:
    return shortened(repr(value), 80)


def shortened(text: str, most: int = 200) -> str:
    """A text as a message quotes it: no more than its first `most` characters."""
    return text if len(text) <= most else f"{text[:most]}…"
