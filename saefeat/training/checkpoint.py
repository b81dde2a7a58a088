"""Checkpoints: a run's state on disk, whole or absent, from which it goes on to the last bit.

A checkpoint is a folder `checkpoints/step-<number>/` of its run:

- `checkpoint.json`: where the run was, and the hash of every other file;
- `training.safetensors`: weights, optimizer, counters and random numbers;
- `stream.safetensors`: rows that the stream had read and not yet given;
- `saes/`: its dictionaries as `train` would hand them out, so that `load_dictionary` and
  `Bank.load` open a run that is still going on.
"""

import logging
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saefeat.core.distributed import Ranks
from saefeat.core.files import (
    hash_file,
    publish_folder,
    read_json,
    read_tensors,
    temporary_folder,
    write_json,
    write_tensors,
)
from saefeat.core.records import entry, mapping
from saefeat.dictionaries.base import Dictionary
from saefeat.training.bank import Key, dictionary_folder

FORMAT_VERSION = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a run needs to go on."""

    step: int
    """Steps that were made."""
    training: dict[str, Tensor]
    """See `BankLearner.state`."""
    stream: dict[str, Any]
    """See `TrainingBatches.state`: facts that JSON holds."""
    stream_rows: dict[str, Tensor]
    """And its rows."""


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    dictionaries: Iterable[tuple[Key, Dictionary]],
    *,
    keep_last: int,
) -> Path:
    """Write a checkpoint into the `checkpoints` folder of a run, and drop the oldest.

    Returns:
        Its folder, which appears only once everything in it is on disk.

    Raises:
        OSError: It could not be written; those that were there before still are.
    """
    path = folder / f"step-{checkpoint.step:09d}"
    with temporary_folder(path) as draft:
        for key, dictionary in dictionaries:
            dictionary.save(dictionary_folder(draft / "saes", key))
        write_tensors(draft / "training.safetensors", checkpoint.training)
        write_tensors(draft / "stream.safetensors", checkpoint.stream_rows)
        hashes = {
            str(file.relative_to(draft)): hash_file(file)
            for file in sorted(draft.rglob("*"))
            if file.is_file()
        }
        facts = {
            "format_version": FORMAT_VERSION,
            "step": checkpoint.step,
            "stream": checkpoint.stream,
            "blake2b": hashes,
        }
        write_json(draft / "checkpoint.json", facts)
        publish_folder(draft, path)
    for old in _all(folder)[keep_last:]:
        shutil.rmtree(old)
    return path


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if the folder holds none at all.

    One that is damaged is passed over for the one before, with a warning in the log.

    Raises:
        ValueError: Every checkpoint is damaged; what is wrong with the newest is said.
    """
    first_problem: str | None = None
    for path in _all(folder):
        try:
            return _load(path)
        except (ValueError, OSError) as problem:
            first_problem = first_problem or f"{path} is damaged: {problem}"
            logger.warning("%s is damaged (%s); the checkpoint before is tried.", path, problem)
    if first_problem:
        raise ValueError(f"{first_problem}. No other checkpoint is whole, so nothing is resumed.")
    return None


def shared_checkpoint(checkpoint: Checkpoint | None, ranks: Ranks) -> Checkpoint | None:
    """What the first process has read, for all, which need not see its disk."""
    if ranks.size == 1:
        return checkpoint
    facts = ranks.told(None if checkpoint is None else (checkpoint.step, checkpoint.stream))
    if facts is None:
        return None
    step, stream = facts
    training = None if checkpoint is None else checkpoint.training
    rows = None if checkpoint is None else checkpoint.stream_rows
    return Checkpoint(
        step=step,
        stream=stream,
        training=ranks.tensors_of(0, training),
        stream_rows=ranks.tensors_of(0, rows),
    )


def _all(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(r"step-\d+", p.name)), reverse=True)


def _load(path: Path) -> Checkpoint:
    facts = mapping(read_json(path / "checkpoint.json"), "checkpoint.json")
    if facts.get("format_version") != FORMAT_VERSION:
        raise ValueError("checkpoint.json is of another version")
    hashes = entry(facts, "blake2b", dict[str, str], "checkpoint.json")
    for name in {*hashes, "training.safetensors", "stream.safetensors"}:
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if hash_file(path / name) != hashes.get(name):
            raise ValueError(f"{name} is not as it was written")
    return Checkpoint(
        step=entry(facts, "step", int, "checkpoint.json"),
        stream=entry(facts, "stream", dict[str, Any], "checkpoint.json"),
        training=read_tensors(path / "training.safetensors"),
        stream_rows=read_tensors(path / "stream.safetensors"),
    )
