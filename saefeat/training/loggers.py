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

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()
