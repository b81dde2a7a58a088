"""Who is told how a run goes, and what becomes of the run when one of them fails."""

from collections.abc import Mapping, Sequence
from typing import Any

from saefeat.training.bank import Bank


class Callback:
    """Is told how a run goes: `train(callbacks=[...])`. Override what you need.

    The calls come from the thread that trains, between two steps, so a slow one slows the run.
    """

    def start(self, description: Mapping[str, Any], step: int) -> None:
        """Training begins.

        Args:
            description: What `config.json` says of the run.
            step: Steps that were done before, in a run that is gone on with; else 0.
        """

    def record(self, record: Mapping[str, Any]) -> None:
        """One dictionary after a step, every `log_every` steps: a line of `metrics.jsonl`.

        `step`, `n_tokens` and `wall_seconds`; `hook_name`, `expansion_factor` and `seed`; and
        what was measured, each a float by its name: `fvu`, `l0` and the terms of the loss.
        """

    def end(self, bank: Bank | None) -> None:
        """Training has ended, and the dictionaries are on disk; None if it did not get so far."""


class CallbackError(RuntimeError):
    """A callback raised; the message says in which step, and how to go on with the run."""


class Listeners:
    """The callbacks of one run. One that raised is told no more than that the run has ended."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)
        self._started: list[Callback] = []
        self._silent: list[Callback] = []
        self.error: Exception | None = None
        """The first that a callback raised since the start."""
        self.culprit = ""
        """Which callback, and when."""

    def __len__(self) -> int:
        return len(self._callbacks)

    def start(self, description: Mapping[str, Any], step: int) -> None:
        """Tell all that training begins; what one raises is raised, as nothing can be lost."""
        for one in self._callbacks:
            self._started.append(one)
            one.start(description, step)

    def record(self, record: Mapping[str, Any]) -> None:
        """Tell all of a dictionary after a step."""
        for one in self._callbacks:
            if one not in self._silent:
                try:
                    one.record(record)
                except Exception as error:
                    self._note(one, error, f"in step {record['step']}")

    def end(self, bank: Bank | None) -> None:
        """Tell all that were told of the start."""
        started, self._started = self._started, []
        for one in started:
            try:
                one.end(bank)
            except Exception as error:
                self._note(one, error, "at the end")

    def raise_error(self, how_to_go_on: str) -> None:
        """Raise what a callback raised, if one did, with what has become of the run."""
        if self.error is not None:
            raise CallbackError(
                f"{self.culprit}: {type(self.error).__name__}: {self.error}. {how_to_go_on}"
            ) from self.error

    def _note(self, callback: Callback, error: Exception, when: str) -> None:
        self._silent.append(callback)
        if self.error is None:
            self.error = error
            self.culprit = f"The callback {type(callback).__name__} raised {when}"
