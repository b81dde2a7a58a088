"""The one progress bar: a bar in a terminal, a widget in a notebook, lines in a log file."""

import sys
from typing import Any

from tqdm import auto, notebook, std

LOG_SECONDS = 10.0
"""Least time between two lines where standard error is no terminal, as in a log file."""


class LogLines(std.tqdm):
    """A bar for what keeps every character: whole lines, and few of them."""

    def __init__(self, **options: Any) -> None:
        # Also the most seconds, so that the count of steps between two lines is learned afresh.
        super().__init__(mininterval=LOG_SECONDS, maxinterval=LOG_SECONDS, ncols=79, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line, where a bar would go back over its last one."""
        self.fp.write(f"{self if msg is None else msg}\n")
        self.fp.flush()
        return True

    def close(self) -> None:
        """Write how it ended, once."""
        if not self.disable:
            self.display()
        # What tqdm would do besides is to move the cursor.
        self.disable: bool = True


def progress_bar(
    *, desc: str, unit: str, total: int | None = None, initial: int = 0, shown: bool = True
) -> std.tqdm:
    """A bar with rate and, where `total` is given, time left; `update(n)` moves it.

    Args:
        desc: What is going on, in a word or two.
        unit: What is counted.
        total: How many there will be.
        initial: How many had been done before.
        shown: False shows nothing.
    """
    is_notebook = issubclass(auto.tqdm, notebook.tqdm_notebook)
    kind = auto.tqdm if is_notebook or sys.stderr.isatty() else LogLines
    bar: std.tqdm = kind(total=total, initial=initial, unit=unit, desc=desc, disable=not shown)
    return bar
