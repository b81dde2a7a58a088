"""The folder of a run: what it was asked for, how it went, where it can be gone on from.

`config.json` first, `metrics.jsonl` and `checkpoints/` as it goes, `saes/` once it has ended.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saefeat.core.files import (
    check_unclaimed,
    parse_json,
    publish_folder,
    read_json,
    temporary_folder,
    write_bytes,
    write_json,
)
from saefeat.core.folders import LocalFolder
from saefeat.core.locks import WriterLock
from saefeat.core.records import entry, mapping, shortened
from saefeat.training.bank import Bank

MAY_DIFFER = ("torch", "threads", "processes", "parallel")
"""Entries of `config.json` that may be others when a run is gone on with."""
NOT_COMPARED = ("notes",)
"""Entries that decide nothing."""

logger = logging.getLogger(__name__)


class RunFolder:
    """A run on disk, held against other writers while it is open.

    Args:
        path: A new folder, or with `resume` that of a run.
        description: What the run was asked for, as JSON holds it.
        resume: Whether to go on with the run that is there, if there is one.

    Raises:
        FileExistsError: The folder holds files, and `resume` is not set or they are no run's.
        ValueError: The run that is there was asked for something else; the entry is named.
        BlockingIOError: Another process is writing there.
    """

    def __init__(self, path: Path, description: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        has_run = resume and (path / "config.json").is_file()
        if not has_run:
            _check_new(path)
        self._lock = WriterLock(LocalFolder(path))
        self._lock.__enter__()
        try:
            # Through JSON, so that tuples and lists are equal.
            asked = json.loads(json.dumps(description))
            if has_run:
                self._check_same(asked)
            else:
                write_json(path / "config.json", asked)
        except BaseException:
            self.close()
            raise

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of what was measured on the way."""
        return self.path / "metrics.jsonl"

    @property
    def is_finished(self) -> bool:
        """Whether its dictionaries have been written."""
        return (self.path / "saes").is_dir()

    def cut_metrics(self, last_step: int) -> None:
        """Drop what was measured after a step, and a line that was not written to its end."""
        if not self.metrics.exists():
            # A link to nowhere, which whoever appends to it would follow.
            self.metrics.unlink(missing_ok=True)
            return
        kept = []
        for line in self.metrics.read_bytes().splitlines(keepends=True):
            try:
                record = mapping(parse_json(line, "a record"), "a record")
                is_kept = line.endswith(b"\n") and entry(record, "step", int, "it") <= last_step
            except ValueError:
                is_kept = False
            if is_kept:
                kept.append(line)
        write_bytes(self.metrics, b"".join(kept))

    def finish(self, bank: Bank) -> None:
        """Write the trained dictionaries, all or none."""
        self._lock.check()
        with temporary_folder(self.path / "saes") as draft:
            bank.save(draft)
            publish_folder(draft, self.path / "saes")

    def close(self) -> None:
        """Let others write."""
        self._lock.__exit__(None, None, None)

    def _check_same(self, asked: Mapping[str, Any]) -> None:
        path = self.path / "config.json"
        written = read_json(path)
        if not isinstance(written, dict):
            raise ValueError(f"{path} does not describe a run.")
        for name in {**written, **asked}:
            if name in NOT_COMPARED or written.get(name) == asked.get(name):
                continue
            if name not in MAY_DIFFER:
                found, wanted = (shortened(json.dumps(one.get(name))) for one in (written, asked))
                raise ValueError(
                    f"The run in {self.path} cannot be gone on with: its {name} is {found}, and "
                    f"{wanted} was asked for. Ask for the same, or begin a new run in another "
                    "folder."
                )
            logger.warning(
                "The run in %s was begun with %s %s, and goes on with %s: it may end with other "
                "last digits.",
                *(self.path, name, written.get(name), asked.get(name)),
            )


def _check_new(path: Path) -> None:
    # A lock that a killed process left is no file of a run.
    if path.is_dir() and {one.name for one in path.iterdir()} <= {".lock"}:
        return
    check_unclaimed(path, "run")
