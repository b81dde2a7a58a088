"""Checkpoints: a run's state on disk, whole or absent, from which it goes on to the last bit.

A checkpoint is a folder `checkpoints/step-<number>/` of its run:

- `checkpoint.json`: where the run was, and the hash of every other file;
- `training.safetensors`: weights, optimizer, counters and random numbers;
- `stream.safetensors`: rows that the stream had read and not yet given;
- `saes/`: its dictionaries as `train` would hand them out, so that `load_dictionary` and
  `Bank.load` open a run that is still going on.

Of several processes each writes what it has: process 3 its own `training-00003.safetensors` and
`stream-00003.safetensors`, with what the others lack, and of `saes/` its dictionaries, or its
latents of each. Nothing is sent to be written. Any number of processes, dividing anything, goes on
from there, each reading what it needs: `SavedTensors` does not show by whom a tensor was written.
"""

import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saefeat.core.distributed import ALONE, Ranks
from saefeat.core.files import (
    hash_file,
    publish_folder,
    read_json,
    temporary_folder,
    write_json,
)
from saefeat.core.records import entry, mapping
from saefeat.core.tensor_parts import Parts, SavedTensors, write_parts
from saefeat.training.bank_learner import BankLearner

FORMAT_VERSION = 1
TRAINING, STREAM = "training", "stream"
"""What the files of tensors are called, those of the first process without a number."""
VISIBLE_AFTER_SECONDS = 60.0
"""For so long the clients of NFS believe, by default, that what was not there still is not."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a run needs to go on, of which each process reads what it needs."""

    step: int
    """Steps that were made."""
    training: SavedTensors
    """See `BankLearner.state`."""
    stream: dict[str, Any]
    """See `TrainingBatches.state`: facts that JSON holds."""
    stream_rows: SavedTensors
    """And its rows."""


def save_checkpoint(
    folder: Path,
    learner: BankLearner,
    stream: tuple[Mapping[str, Any], Parts],
    *,
    keep_last: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write a checkpoint into the `checkpoints` folder of a run, and drop the oldest.

    Args:
        folder: The folder, on a disk that all processes have.
        learner: The bank.
        stream: Where the stream is: facts, the same in all processes, and those of its rows that
            this one writes.
        keep_last: Checkpoints that are kept.
        ranks: The processes, all of which call this.

    Returns:
        Its folder, which appears only once all that every process writes of it is on disk.

    Raises:
        OSError: Some process could not write; all raise it, and the checkpoints that were there
            before still are.
    """
    path = folder / f"step-{learner.step_number:09d}"
    what = f"The checkpoint after step {learner.step_number}"
    own = what if ranks.size == 1 else f"{what}, by process {ranks.rank} of {ranks.size},"
    facts, rows = stream
    training = learner.state()
    with ExitStack() as stack:

        @saying_how_to_go_on(what)
        def begin() -> Path:
            draft = stack.enter_context(temporary_folder(path))
            learner.prepare_dictionaries(draft / "saes")
            return draft

        @saying_how_to_go_on(own)
        def write() -> list[str]:
            check_visible(draft, ranks)
            files = learner.save_dictionaries(draft / "saes")
            for kind, tensors in ((TRAINING, training), (STREAM, rows)):
                if tensors or ranks.is_first:
                    number = "" if ranks.is_first else f"-{ranks.rank:05d}"
                    files.append(draft / f"{kind}{number}.safetensors")
                    write_parts(files[-1], tensors)
            return [str(file.relative_to(draft)) for file in files]

        @saying_how_to_go_on(own)
        def hash_own() -> dict[str, str]:
            return {name: hash_file(draft / name) for name in names[ranks.rank]}

        @saying_how_to_go_on(what)
        def publish() -> None:
            written = {
                "format_version": FORMAT_VERSION,
                "step": learner.step_number,
                "stream": facts,
                "blake2b": {name: one for part in hashes for name, one in sorted(part.items())},
            }
            write_json(draft / "checkpoint.json", written)
            publish_folder(draft, path)

        draft = ranks.from_first(begin)
        names = ranks.on_all(write)
        # Only now, since several processes may have written into one file.
        hashes = ranks.on_all(hash_own)
        ranks.on_first(publish)
    ranks.on_first(lambda: _drop(_all(folder)[keep_last:]))
    return path


def load_newest(folder: Path, ranks: Ranks = ALONE) -> Checkpoint | None:
    """The newest checkpoint that is whole; None if the folder holds none at all.

    One that is damaged is passed over for the one before, with a warning in the log. Each process
    checks some of the files.

    Raises:
        ValueError: Every checkpoint is damaged; what is wrong with the newest is said.
    """
    first_problem: str | None = None
    for path in ranks.from_first(lambda: _all(folder)):
        problem: str | None = None
        try:
            found = _load(path, ranks)
        except (ValueError, OSError) as error:
            problem = str(error)
        problem = next((one for one in ranks.each(problem) if one is not None), None)
        if problem is None:
            return found
        first_problem = first_problem or f"{path} is damaged: {problem}"
        if ranks.is_first:
            logger.warning("%s is damaged (%s); the checkpoint before is tried.", path, problem)
    if first_problem:
        raise ValueError(f"{first_problem}. No other checkpoint is whole, so nothing is resumed.")
    return None


def check_visible(path: Path, ranks: Ranks) -> None:
    """Wait for a folder that the first process has made to be there for this one too.

    Raises:
        FileNotFoundError: It is not, on a disk of another machine perhaps.
    """
    last_look = time.monotonic() + VISIBLE_AFTER_SECONDS
    while not path.is_dir():
        if time.monotonic() >= last_look:
            raise FileNotFoundError(
                f"Process {ranks.rank} of {ranks.size} does not see {path}, which the first does. "
                "Put the folder of a run on a disk that all its processes have."
            )
        time.sleep(0.1)


@contextmanager
def saying_how_to_go_on(what: str) -> Iterator[None]:
    """Names what could not be written where an error of the disk comes."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{what} could not be written ({error.strerror or error}). Checkpoints that were "
            "written before are whole: go on from the last with resume=True",
        ) from error


def _all(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(r"step-\d+", p.name)), reverse=True)


def _drop(checkpoints: Sequence[Path]) -> None:
    for path in checkpoints:
        shutil.rmtree(path)


def _load(path: Path, ranks: Ranks) -> Checkpoint:
    check_visible(path, ranks)
    facts = mapping(read_json(path / "checkpoint.json"), "checkpoint.json")
    if facts.get("format_version") != FORMAT_VERSION:
        raise ValueError("checkpoint.json is of another version")
    hashes = entry(facts, "blake2b", dict[str, str], "checkpoint.json")
    names = sorted({*hashes, f"{TRAINING}.safetensors", f"{STREAM}.safetensors"})
    for name in names[ranks.rank :: ranks.size]:
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if hash_file(path / name) != hashes.get(name):
            raise ValueError(f"{name} is not as it was written")

    def tensors(kind: str) -> SavedTensors:
        parts = re.compile(rf"{kind}(-\d+)?\.safetensors")
        return SavedTensors([path / name for name in names if parts.fullmatch(name)])

    return Checkpoint(
        step=entry(facts, "step", int, "checkpoint.json"),
        stream=entry(facts, "stream", dict[str, Any], "checkpoint.json"),
        training=tensors(TRAINING),
        stream_rows=tensors(STREAM),
    )
