"""What reading hooks costs: tokens per second, against the bare forward, caching and SAELens.

Four ways take turns on the same contexts, SmolLM2-135M with all of its 30 residual streams:

- reader: `HookReader`, which copies every hook into its buffers and stops at the deepest;
- bare: the same forward, stopped at the same point by a hook that only raises;
- cache: `run_with_cache` with the same hooks, which runs to the logits;
- store: SAELens's `ActivationsStore` for several hooks, which reads all of them in one pass: it
  takes the contexts from its data set, runs `get_multi_hook_activations` and flattens, as it does
  for each forward of a training run, less its buffer. Left empty if sae-lens is not installed.

    pip install -e ".[bench]"
    python benchmarks/harvest.py --out benchmarks/results/harvest.csv

One row: tokens_per_s of each way are of its median over the rounds; reader_over_x is the median
over the rounds of x's time over the reader's in that round, how many times as fast the reader is.
"""

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Int
from machine import in_turn, ratio, where, write_row
from torch import Tensor

from saefeat.activations import HookReader
from saefeat.models import load_model


@dataclass
class Options:
    out: Path = Path("harvest.csv")
    hooks: str = "blocks.*.hook_resid_post"
    rounds: int = 7
    warm_up: int = 1
    """Rounds before those that count."""
    contexts: int = 16
    """Contexts in one forward."""
    context_size: int = 128


class Stopped(Exception):  # noqa: N818 (it is no error)
    """Raised at the deepest hook by the bare forward."""


def stop(value: Tensor, hook: Any) -> None:
    raise Stopped


def main(options: Options) -> None:
    model = load_model("smollm2-135m")
    generator = torch.Generator().manual_seed(0)
    shape = (options.contexts, options.context_size)
    ids = torch.randint(3, model.cfg.d_vocab, shape, generator=generator)
    device = next(model.parameters()).device
    ids = ids.to(device)
    reader = HookReader(model, options.hooks)
    deepest = model.hook_dict[reader.hooks[-1]]

    def read(_: int) -> None:
        reader.read(ids)

    def bare(_: int) -> None:
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

    def cache(_: int) -> None:
        with torch.no_grad():
            model.run_with_cache(ids, names_filter=reader.hooks)

    ways = {"reader": read, "bare": bare, "cache": cache}
    if find_spec("sae_lens") is None:
        print('The store needs sae-lens, which is not installed. Run: pip install -e ".[bench]"')
    else:
        ways["store"] = store(model, ids, reader.hooks)
    seconds = in_turn(ways, rounds=options.rounds, warm_up=options.warm_up, device=device)
    row = {
        **where(device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "hooks": len(reader.hooks),
        "tokens": ids.numel(),
        "rounds": options.rounds,
    }
    names = ("reader", "bare", "cache", "store")
    for name in names:
        row[f"{name}_tokens_per_s"] = (
            round(ids.numel() / statistics.median(seconds[name])) if name in seconds else ""
        )
    for name in names[1:]:
        row[f"reader_over_{name}"] = (
            f"{ratio(seconds[name], seconds['reader']):.3f}" if name in seconds else ""
        )
    write_row(options.out, row)


def store(model: Any, ids: Int[Tensor, "c s"], hooks: list[str]) -> Callable[[int], object]:
    """A pass of SAELens's store over the same contexts as the others."""
    from datasets import Dataset
    from sae_lens.training.activations_store import ActivationsStore

    with warnings.catch_warnings():
        # That the data set is smaller than a training run.
        warnings.simplefilter("ignore", UserWarning)
        reading = ActivationsStore.from_config_multi_hook(
            model=model,
            dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
            hook_names=hooks,
            hook_d_ins=dict.fromkeys(hooks, model.cfg.d_model),
            streaming=False,
            context_size=ids.shape[1],
            store_batch_size_prompts=len(ids),
            device=ids.device,
        )

    def read(_: int) -> None:
        with warnings.catch_warnings():
            # It copies tensors by torch.tensor, which torch warns of.
            warnings.simplefilter("ignore", UserWarning)
            tokens = reading.get_batch_tokens()
        activations = reading.get_multi_hook_activations(tokens)
        for x in activations.values():
            x.to(reading.device).reshape(-1, x.shape[-1])

    return read


if __name__ == "__main__":
    main(tyro.cli(Options))
