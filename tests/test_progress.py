"""Progress bars: whole lines and few of them in a log file, one bar in a terminal."""

import io
import sys

import pytest

from saefeat.core import progress
from saefeat.core.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def drawn_on(monkeypatch, stream, *, n_updates, **options):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(desc="training", unit="tok", **options) as bar:
        for _ in range(n_updates):
            bar.update(10)
    return stream.getvalue()


def test_a_log_file_gets_the_first_and_the_last_line_of_a_short_run(monkeypatch):
    first, last = drawn_on(monkeypatch, io.StringIO(), n_updates=100, total=1000).splitlines()
    assert first.startswith("training:   0%")
    assert last.startswith("training: 100%")
    assert "1000/1000" in last
    assert "tok/s" in last


def test_a_log_file_gets_a_line_in_each_span_of_time(monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr(progress.std, "time", lambda: float(next(now)))
    monkeypatch.setattr(progress.LogLines, "monitor_interval", 0)
    written = drawn_on(monkeypatch, io.StringIO(), n_updates=200, total=4000)
    lines = written.splitlines()
    # tqdm looks at the clock a few times between two lines; each look is a second here.
    assert 5 < len(lines) < 50
    assert "\r" not in written
    assert "<" in lines[5], "no time left"


def test_a_terminal_has_one_bar_that_goes_back_over_itself(monkeypatch):
    written = drawn_on(monkeypatch, Terminal(), n_updates=100, total=1000)
    assert written.count("\n") == 1
    assert "\r" in written


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_bar_that_is_not_shown_writes_nothing(monkeypatch, stream):
    assert drawn_on(monkeypatch, stream(), n_updates=9, shown=False) == ""


def test_a_notebook_has_a_widget(monkeypatch):
    class Widget(progress.notebook.tqdm_notebook):
        def __init__(self, **options):
            self.options = options

        def __del__(self):
            pass

    monkeypatch.setattr(progress.auto, "tqdm", Widget)
    bar = progress_bar(desc="training", unit="tok", total=7)
    assert isinstance(bar, Widget)
    assert bar.options["total"] == 7
