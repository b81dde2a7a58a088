"""Damages the files of a folder, and says whether what reads them refuses that clearly."""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

Files = dict[str, bytes]
"""What is in a folder, by relative path."""
Path_ = tuple[str | int, ...]
"""Keys and indices that lead to a value of a JSON document."""

HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 3, 1.5, -0.0, 2**31, 2**63, 10**30, 1e308, float("nan")),
    *(float("inf"), "", "7", "nan", "../../outside", "/outside", "..", "a\0b", "x" * 5000, "🧨"),
    *([], [[]], [1, 2], [None], {}, {"a": 1}, {"": {}}, [[[[[[1]]]]]]),
]
"""What may stand in a document where something else belongs."""

NO_JSON = [b"", b"\xff\xfe", b"nul", b'{"a": 1', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000]
"""What is no JSON, or more than Python reads of it."""


def files_of(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(files: Files, folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def places(document: Any, here: Path_ = ()) -> Iterator[Path_]:
    """Every value of a document, itself included."""
    yield here
    if isinstance(document, dict):
        for key, value in document.items():
            yield from places(value, (*here, key))
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from places(value, (*here, number))


def changed(document: Any, place: Path_, change: Callable[[Any, Any], None]) -> Any:
    """A copy in which the container of a place has been changed at its last key."""
    holder = {"all": json.loads(json.dumps(document))}
    container: Any = holder
    for key in ("all", *place)[:-1]:
        container = container[key]
    change(container, ("all", *place)[-1])
    return holder.get("all")


def replaced(document: Any, place: Path_, value: Any) -> Any:
    def change(container: Any, key: Any) -> None:
        container[key] = value

    return changed(document, place, change)


def dropped(document: Any, place: Path_) -> Any:
    return changed(document, place, lambda container, key: container.pop(key))


@st.composite
def damaged_json(draw: Any, data: bytes) -> bytes:
    """A document of which one value is gone, another, or one too many; or which is none."""
    document = json.loads(data)
    how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "no JSON"]))
    if how == "no JSON":
        return draw(st.sampled_from(NO_JSON))
    place = draw(st.sampled_from(list(places(document))))
    value = draw(st.sampled_from(HOSTILE))
    if how == "add":
        document = replaced(document, (), {**document, "surprise": value})
    elif how == "drop":
        document = dropped(document, place)
    else:
        document = replaced(document, place, value)
    return json.dumps(document).encode()


@st.composite
def damaged_bytes(draw: Any, data: bytes) -> bytes:
    """Bytes that were cut off, changed, put in or doubled."""
    start, stop = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    how = draw(st.sampled_from(["cut", "flip", "header", "zero", "insert", "double"]))
    if how == "cut":
        return data[:start]
    if how in ("flip", "header") and data:
        at = start % (len(data) if how == "flip" else min(len(data), 200))
        return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
    if how == "zero":
        return data[:start] + bytes(stop - start) + data[stop:]
    if how == "insert":
        return data[:start] + draw(st.binary(min_size=1, max_size=9)) + data[start:]
    return data[:stop] + data[start:]


ODD_TENSORS = [
    torch.empty(0),
    torch.tensor(1.0),
    torch.tensor([torch.nan, -1.0]),
    torch.full((3, 2), torch.inf),
    torch.ones(2, 3, 4),
    torch.zeros(0, 10**12),
    torch.ones(4, dtype=torch.int64) * 2**40,
    torch.ones(6, 6, dtype=torch.bool),
    torch.ones(3, 3).to(torch.float8_e4m3fn),
]


@st.composite
def damaged_tensors(draw: Any, data: bytes) -> bytes:
    """A valid safetensors file in which one tensor is gone, another, or misnamed."""
    tensors = load(data)
    how = draw(st.sampled_from(["replace", "replace", "drop", "rename", "dtype", "shape", "value"]))
    name = draw(st.sampled_from(sorted(tensors) or ["none"]))
    old = tensors.get(name, torch.zeros(2))
    if how == "drop":
        tensors.pop(name, None)
    elif how == "rename":
        tensors["surprise"] = tensors.pop(name, old)
    elif how == "dtype":
        tensors[name] = old.to(draw(st.sampled_from([torch.int32, torch.float64, torch.uint8])))
    elif how == "shape":
        tensors[name] = draw(st.sampled_from([old[None], old.flatten(), old.flatten()[1:]]))
    elif how == "value" and old.numel():
        odd = draw(st.sampled_from([torch.nan, torch.inf, -(2.0**40), 1e38]))
        tensors[name] = old.clone()
        tensors[name].view(-1)[0] = odd if old.is_floating_point() else -1
    else:
        tensors[name] = draw(st.sampled_from(ODD_TENSORS))
    return save({name: one.contiguous() for name, one in tensors.items()})


@st.composite
def damaged(draw: Any, files: Files) -> tuple[str, bytes]:
    """The name of one of the files, and what it holds now."""
    name = draw(st.sampled_from(sorted(files)))
    data = files[name]
    ways = [damaged_bytes(data)]
    if name.endswith(".json"):
        ways = [damaged_json(data)] * 3 + ways
    if name.endswith(".safetensors"):
        ways = [damaged_tensors(data)] * 2 + ways
    return name, draw(st.one_of(ways))


def check_refused_or_used(files: Files, use: Callable[[Path, Path], None]) -> str | None:
    """Uses a folder of these files; what it is refused with, if it is.

    The error is one that the command line prints in one line, and nothing is written but in the
    folder and in the one that is given for output.
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve() / "a" / "b" / "c"
        folder, out = write(files, root / "folder"), root / "out"
        refusal: Exception | None = None
        try:
            use(folder, out)
        except (ValueError, OSError) as error:
            refusal = error
        everything = {path.relative_to(root).parts[0] for path in root.rglob("*")}
        assert everything <= {"folder", "out"}
        assert [path.name for path in Path(name).rglob("*")][:3] == ["a", "b", "c"]
    if refusal is None:
        return None
    # A subclass (UnicodeDecodeError, JSONDecodeError) would be some library's own words.
    assert type(refusal) is ValueError or isinstance(refusal, OSError), repr(refusal)
    assert 20 < len(str(refusal)) < 2000
    return str(refusal)
