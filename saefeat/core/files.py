"""Files that are whole or absent: every write is atomic and every read is checked."""

import glob
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

LARGEST_JSON = 2**28
"""Bytes. The index of a thousand terabytes of activations takes less."""


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file, replacing an older one only once the new one is on disk.

    Raises:
        TypeError: `value` holds something that JSON cannot.
        ValueError: `value` holds NaN or infinity, which JSON has no way to write.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file, replacing an older one only once the new one is on disk."""
    _replace(Path(path), lambda temporary: temporary.write_bytes(data))


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, replacing an older one only once the new one is on disk.

    Raises:
        OSError: The disk is full, or fails.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(Path(path), lambda temporary: _save(whole, temporary, metadata))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not valid JSON.
    """
    n_bytes = Path(path).stat().st_size
    if n_bytes > LARGEST_JSON:
        raise ValueError(f"{path} is no JSON of this library: it has {n_bytes:,} bytes.")
    return parse_json(Path(path).read_bytes(), path)


def parse_json(data: bytes | str, name: object) -> Any:
    """What JSON says; NaN and infinity are none.

    Raises:
        ValueError: It is not valid JSON; `name` is what the error calls it.
    """
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({error}); it is damaged or cut off.") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a whole safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it is damaged or cut off."
        ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlace:
    """Where a tensor lies in a safetensors file."""

    dtype: str
    """As safetensors names it: "F32", "BF16", "I8", …"""
    shape: tuple[int, ...]
    """The sizes."""
    start: int
    """Its first byte in the file."""
    stop: int
    """The byte after its last."""


# Bytes of an element, of the dtypes that this library writes.
_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I8": 1, "BOOL": 1}
# A header takes some hundred bytes for each tensor; the format itself stops at this size.
_LONGEST_HEADER = 100_000_000


def read_tensor_places(
    read: Callable[[int, int], bytes], n_bytes: int, name: str
) -> dict[str, TensorPlace]:
    """What the header of a safetensors file says is in it, checked before anything is loaded.

    Args:
        read: Gives bytes `start` up to `stop` of the file.
        n_bytes: The size of the file.
        name: What an error calls it.

    Raises:
        ValueError: The header is not one, or a tensor is not of the size that its shape and
            dtype have, or does not lie within the file.
    """
    header_bytes = int.from_bytes(read(0, 8), "little") if n_bytes >= 8 else n_bytes
    if not 0 < header_bytes <= min(n_bytes - 8, _LONGEST_HEADER):
        raise ValueError(
            f"{name} is not a whole safetensors file (its header claims {header_bytes} bytes of "
            f"{n_bytes}); it is damaged or cut off."
        )
    try:
        header = parse_json(read(8, 8 + header_bytes), "its header")
        places = {
            tensor: _place(entry, 8 + header_bytes)
            for tensor, entry in header.items()
            if tensor != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{name} has no valid safetensors header ({error}); it is damaged."
        ) from None
    for tensor, place in places.items():
        if place.stop > n_bytes:
            raise ValueError(
                f"{name} ends before its tensor {tensor!r} does; it is damaged or cut off."
            )
    return places


def _place(entry: Any, first: int) -> TensorPlace:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    sizes = [*shape, start, stop]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("a size is no natural number")
    if stop - start != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{stop - start} bytes are not {list(shape)} of {dtype}")
    return TensorPlace(dtype=dtype, shape=shape, start=first + start, stop=first + stop)


def claim_folder(folder: str | Path, what: str = "run") -> Path:
    """Make a new folder, or take an empty one, so that nothing is ever overwritten.

    Raises:
        FileExistsError: It holds files, or is one.
    """
    check_unclaimed(folder, what)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def check_unclaimed(folder: str | Path, what: str = "run") -> None:
    """Raise what `claim_folder` would, without making the folder."""
    folder = Path(folder)
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file, and a folder is needed for the {what}.")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} already holds files, and a {what} never overwrites anything. "
            "Choose another folder, or delete this one."
        )


@contextmanager
def temporary_folder(path: str | Path, *, is_shared: bool = False) -> Iterator[Path]:
    """A hidden folder beside `path`, to be filled and then given to `publish_folder`.

    It is gone afterwards, whatever happened, unless it was published.

    Args:
        path: The name that the folder is to have.
        is_shared: Whether other processes may be filling theirs for the same `path`. If not,
            what a killed process left of one is deleted.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_shared:
        for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 32}"):
            shutil.rmtree(left)
    draft = _hidden(path)
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish_folder(draft: Path, path: str | Path, *, replace: bool = True) -> None:
    """Give a folder, whose files are on disk, its name.

    Args:
        draft: What `temporary_folder` made.
        path: The name.
        replace: Whether it takes the place of an older folder; if not, that one stays.
    """
    path = Path(path)
    for folder in (draft, *(inner for inner in draft.rglob("*") if inner.is_dir())):
        sync(folder)
    older = _hidden(path)
    if replace and path.is_dir():
        # Deleted only under another name: a kill would leave a part of it under its own.
        path.rename(older)
    try:
        draft.rename(path)
    except OSError:
        if older.is_dir():
            older.rename(path)
        if replace or not path.is_dir():
            raise
    sync(path.parent)
    if older.is_dir():
        shutil.rmtree(older)


def hash_bytes(data: bytes) -> str:
    """BLAKE2b with 32 bytes, in hexadecimal: 1.4 GB/s on one core here, and fast on all of 64 bits.

    SHA-256 is faster only where the processor has instructions for it, and three times slower
    elsewhere; both are in Python's standard library, and neither can be forged.
    """
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def hash_file(path: str | Path) -> str:
    """`hash_bytes` of a file, read a piece at a time."""
    digest = hashlib.blake2b(digest_size=32)
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        # A full disk is said in words alone.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path)
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _hidden(path: Path) -> Path:
    """A new name in the same folder, so that the last step is a rename within one file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")
