"""What every benchmark needs: taking turns, a clock, and a CSV that says where it ran."""

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def in_turn(
    contestants: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    warm_up: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after `warm_up` rounds that do not count.

    In a round each runs once, in an order that turns round every time, so that a machine that
    slows down for a while slows all of them down. A contestant is given the round's number.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(-warm_up, rounds):
        order = list(contestants) if round_ % 2 == 0 else list(reversed(contestants))
        for name in order:
            run = contestants[name]
            taken = seconds_of(lambda run=run, number=round_ + warm_up: run(number), device)
            if round_ >= 0:
                seconds[name].append(taken)
    return seconds


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run` takes, what it leaves to do on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def where(device: torch.device) -> dict[str, object]:
    """The columns that every row begins with."""
    return {
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def processor(device: torch.device) -> str:
    """The name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, with "-dirty" where files differ from it."""
    folder = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def read_rows(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV, each by its columns; none if the file is not there."""
    if not table.is_file():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def write_row(out: Path, row: Mapping[str, Any]) -> None:
    """Append a row to the CSV `out`, begun if it is not there, and print it.

    Raises:
        ValueError: The file has other columns.
    """
    columns = list(row)
    is_new = not out.is_file()
    if not is_new:
        with out.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns:
            raise ValueError(
                f"{out} has the columns {found}, and this row has {columns}. It was written by "
                "another version of the script: move it away, or give another --out."
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    print(", ".join(f"{name}={value}" for name, value in row.items()), flush=True)
