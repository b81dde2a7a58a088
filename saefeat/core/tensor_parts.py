"""Tensors in files of safetensors: each in one file, or in several by runs of its rows.

Why not torch.distributed.checkpoint: what it writes by default is unpickled to be read. Its
HuggingFaceStorageWriter and -Reader do without pickle, but are not in every torch that this library
runs with, need a tensor that is divided to be a DTensor on a device mesh (of parts as long as
DTensor makes them, which lists of latents are not), and put a file together in memory first.
Neither has hashes, nor a checkpoint that appears as a whole. What is left to do here is little:
safetensors itself reads any rows of a tensor.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saefeat.core.files import parse_json, write_tensors
from saefeat.core.records import fitted

_ROWS = "rows"
"""Key in the header: JSON, {name: [number of the first row, rows of the whole tensor]}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A run of the rows of a tensor; the others are in other processes."""

    rows: Shaped[Tensor, "m ..."]
    first: int
    """Number of the first of them."""
    n: int
    """Rows of the whole tensor."""


Parts = Mapping[str, Tensor | Part]
"""Tensors by name, each whole or a part."""


def write_parts(path: Path, tensors: Parts) -> None:
    """Write a file that `SavedTensors` reads, together with those of the other parts.

    Where nothing is divided it is a file of safetensors like any other.
    """
    places = {
        name: [one.first, one.n]
        for name, one in tensors.items()
        if isinstance(one, Part) and len(one.rows) < one.n
    }
    here = {name: one.rows if isinstance(one, Part) else one for name, one in tensors.items()}
    write_tensors(path, here, {_ROWS: json.dumps(places)} if places else None)


class SavedTensors(Mapping[str, Tensor]):
    """Tensors on disk, each read when it is asked for; of a divided one also some rows alone.

    What is in several files as a whole is in all of them alike.

    Args:
        paths: The files that `write_parts` wrote in all processes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: One is no whole file of safetensors, or rows of a tensor are missing.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        runs: dict[str, list[_Run]] = {}
        for path in paths:
            for name, run in _runs_in(path):
                runs.setdefault(name, []).append(run)
        self._runs = {name: _in_order(name, found) for name, found in runs.items()}

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        if not shape:
            whole: Tensor = self._runs[name][0].file.get_tensor(name)
            return whole
        return self.rows(name, slice(0, shape[0]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of a whole tensor."""
        first = self._runs[name][0]
        return (first.n, *first.shape[1:]) if first.shape else ()

    def rows(self, name: str, part: slice) -> Shaped[Tensor, "m ..."]:
        """Rows `part.start` up to `part.stop` of a tensor; no others are read."""
        found = [
            run.file.get_slice(name)[max(part.start - run.first, 0) : part.stop - run.first]
            for run in self._runs[name]
            if max(part.start, run.first) < min(part.stop, run.stop)
        ] or [self._runs[name][0].file.get_slice(name)[:0]]
        rows: Tensor = found[0] if len(found) == 1 else torch.cat(found)
        return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """Rows of a tensor that one file has."""

    file: Any
    shape: tuple[int, ...]
    dtype: str
    first: int
    n: int

    @property
    def stop(self) -> int:
        return self.first + self.shape[0]


def _runs_in(path: Path) -> Iterator[tuple[str, _Run]]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it is damaged or cut off."
        ) from None
    written = parse_json((file.metadata() or {}).get(_ROWS, "{}"), f"{_ROWS} in {path.name}")
    places = fitted(written, dict[str, tuple[int, int]], _ROWS, path.name)
    for name in file.keys():  # noqa: SIM118 - it is no mapping
        one = file.get_slice(name)
        shape = tuple(one.get_shape())
        first, n = places.get(name, (0, shape[0] if shape else 1))
        yield name, _Run(file=file, shape=shape, dtype=one.get_dtype(), first=first, n=n)


def _in_order(name: str, runs: list[_Run]) -> list[_Run]:
    """The runs that make a whole tensor, checked before any memory is taken for it."""
    if len({(run.n, len(run.shape), run.shape[1:], run.dtype) for run in runs}) > 1:
        raise ValueError(f"the parts of the tensor {name!r} are of different tensors")
    if not runs[0].shape:
        return runs[:1]
    # Of equal ones, and of an empty one and another at the same place, one.
    by_place = {run.first: run for run in sorted(runs, key=lambda run: run.stop)}
    ordered = [by_place[first] for first in sorted(by_place)]
    stops = [0, *(run.stop for run in ordered)]
    if [run.first for run in ordered] != stops[:-1] or stops[-1] != runs[0].n:
        raise ValueError(f"rows of the tensor {name!r} are missing, or there twice")
    return ordered
