"""What reading hooks costs: tokens per second, against the bare forward and `run_with_cache`.

Three ways take turns on the same batch, SmolLM2-135M with all of its 30 residual streams:

- reader: `HookReader`, which copies every hook into its buffers and stops at the deepest;
- bare: the same forward, stopped at the same point by a hook that only raises;
- cache: `run_with_cache` with the same hooks, which runs to the logits.

Prints a CSV header and one row. The ratios are medians over the rounds of the ratio within a
round, so that a machine that slows down for a while slows both sides down.

    python benchmarks/harvest.py [rounds] [contexts] [context_size]
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saefeat.activations import HookReader
from saefeat.models import load_model

HOOKS = "blocks.*.hook_resid_post"


class Stopped(Exception):  # noqa: N818 (it is no error)
    """Raised at the deepest hook by the bare forward."""


def stop(value: torch.Tensor, hook: Any) -> None:
    raise Stopped


def main(rounds: int = 7, n_contexts: int = 16, context_size: int = 128) -> None:
    model = load_model("smollm2-135m")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.cfg.d_vocab, (n_contexts, context_size), generator=generator)
    device = next(model.parameters()).device
    ids = ids.to(device)
    reader = HookReader(model, HOOKS)
    deepest = model.hook_dict[reader.hooks[-1]]

    def read() -> None:
        reader.read(ids)

    def bare() -> None:
        deepest.add_hook(stop)
        handle = deepest.fwd_hooks[-1]
        try:
            with torch.no_grad():
                model(ids)
        except Stopped:
            pass
        finally:
            handle.hook.remove()
            deepest.fwd_hooks.remove(handle)

    def cache() -> None:
        with torch.no_grad():
            model.run_with_cache(ids, names_filter=reader.hooks)

    ways = {"reader": read, "bare": bare, "cache": cache}
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds):
        order = list(ways) if round_ % 2 == 0 else list(reversed(ways))
        for name in order:
            seconds[name].append(seconds_of(ways[name], device))
    row = {
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "hooks": len(reader.hooks),
        "tokens": ids.numel(),
        "rounds": rounds,
    }
    for name in ways:
        row[f"{name}_tokens_per_s"] = round(ids.numel() / statistics.median(seconds[name]))
    for name in ("bare", "cache"):
        ratios = [b / a for a, b in zip(seconds["reader"], seconds[name], strict=True)]
        row[f"reader_over_{name}"] = f"{statistics.median(ratios):.3f}"
    print(",".join(row))
    print(",".join(str(value).replace(",", " ") for value in row.values()))


def seconds_of(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    folder = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
