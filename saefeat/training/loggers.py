"""Where a run writes what it measures on the way."""

import json
from pathlib import Path
from typing import IO


class MetricsFile:
    """A file with one JSON object a line, whole lines only, readable while the run goes on."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", buffering=1, encoding="utf-8")

    def write(self, record: dict[str, object]) -> None:
        """Append a record."""
        self._file.write(json.dumps(record) + "\n")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
