"""Callbacks that write what a run measures: JSON lines, TensorBoard, Weights & Biases."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from saefeat.training.bank import Bank
from saefeat.training.callbacks import Callback

_PLACE = ("step", "n_tokens", "wall_seconds", "hook_name", "expansion_factor", "seed")
"""Entries of a record that say what it is of."""


class JSONLines(Callback):
    """A file with one JSON object a line, whole lines only, readable while the run goes on.

    `metrics.jsonl` in a run's folder is one. What is there is added to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None

    def start(self, description: Mapping[str, Any], step: int) -> None:
        """Open the file."""
        self._file = self.path.open("a", buffering=1, encoding="utf-8")

    def record(self, record: Mapping[str, Any]) -> None:
        """Append a line."""
        if self._file is None:
            raise ValueError(f"{self.path} is not open: no run has started.")
        self._file.write(json.dumps(record) + "\n")

    def end(self, bank: Bank | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class TensorBoard(Callback):
    """Curves for TensorBoard, `<hook_name>/x<expansion_factor>-seed<seed>/<measure>` over steps.

    A run that is gone on with has the curves after its checkpoint replaced.

    Args:
        folder: Where `tensorboard --logdir` looks.

    Raises:
        ModuleNotFoundError: The package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "TensorBoard's files are written by the package tensorboard, which is not "
                "installed. Run: pip install tensorboard"
            ) from error
        self._open = SummaryWriter
        self._folder = str(folder)
        self._writer: SummaryWriter | None = None

    def start(self, description: Mapping[str, Any], step: int) -> None:
        """Open the file of events; the description is its text "config"."""
        self._writer = self._open(self._folder, purge_step=step + 1 if step else None)
        self._writer.add_text("config", f"```\n{json.dumps(dict(description), indent=2)}\n```")

    def record(self, record: Mapping[str, Any]) -> None:
        """Add a point to each curve."""
        if self._writer is None:
            raise ValueError(f"Nothing is open in {self._folder}: no run has started.")
        for name, value in _curves(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def end(self, bank: Bank | None) -> None:
        """Write what is left, and close."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Callback):
    """Curves for Weights & Biases, by the names that `TensorBoard` gives them.

    Args:
        options: What `wandb.init` takes: project, name, mode="offline", dir, …. To go on with a
            run, its `id` and resume="allow".

    Raises:
        ModuleNotFoundError: The package wandb is not installed.
    """

    def __init__(self, **options: Any) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Weights & Biases needs the package wandb, which is not installed. Run: pip "
                "install wandb"
            ) from error
        self._begin = wandb.init
        self._options = options
        self._run: Any = None

    def start(self, description: Mapping[str, Any], step: int) -> None:
        """Begin a run with the description as its config."""
        self._run = self._begin(config=dict(description), **self._options)

    def record(self, record: Mapping[str, Any]) -> None:
        """Log the curves; those of one step are sent together."""
        self._run.log({"n_tokens": record["n_tokens"], **_curves(record)}, step=int(record["step"]))

    def end(self, bank: Bank | None) -> None:
        """Finish the run, as failed where training was."""
        if self._run is not None:
            self._run.finish(exit_code=0 if bank is not None else 1)


def _curves(record: Mapping[str, Any]) -> dict[str, float]:
    """What was measured, by a name that tells hook, width and seed."""
    place = f"{record['hook_name']}/x{record['expansion_factor']:g}-seed{record['seed']}"
    return {f"{place}/{name}": value for name, value in record.items() if name not in _PLACE}
