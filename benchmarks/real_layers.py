"""How many features do layers of SmolLM2 hold, and how many do those of a random copy of it?

    python benchmarks/real_layers.py --out benchmarks/results/real_layers.csv

The activations of a few layers are written to a store, of SmolLM2-135M and of the same
architecture with the weights that transformers initialises it with; then each layer is counted.
Stores and layers that are there already are left out, so that a run that was stopped goes on when
the command is given again. One row for each comparison of random starts on the way to a count: its
last ("whole") has the answer, those of stage "width" are the width curve.

The text is the standard library's sources, the site residual streams after the named blocks.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import read_rows, where, write_row
from rows import python_sources
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import saefeat as sf
from saefeat.models.packaged import smollm2_folder
from saefeat.training.new_bank import group_name


@dataclass
class Options:
    out: Path = Path("real_layers.csv")
    stores: Path = Path("stores")
    """Where activations are kept: 3 GB a model at the defaults."""
    models: tuple[str, ...] = ("smollm2-135m", "random")
    layers: tuple[str, ...] = ("3", "9", "15")
    """Which; those that are joined by "+", as in 3+9+15, are counted jointly."""
    tokens: int = 1_000_000
    picks: tuple[int, ...] = (2, 4, 8)
    expansion_factors: tuple[float, ...] = (1, 2, 4)


def random_copy(folder: Path) -> Path:
    """SmolLM2's architecture and tokenizer with random weights, as a folder."""
    if not folder.is_dir():
        torch.manual_seed(0)
        source = smollm2_folder()
        config = AutoConfig.from_pretrained(source)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def hook_of(layer: int | str) -> str:
    """The residual stream after a block."""
    return f"blocks.{layer}.hook_resid_post"


def cache(name: str, options: Options) -> Path:
    """The store of a model's activations."""
    store = options.stores / name
    numbers = {int(layer) for layers in options.layers for layer in layers.split("+")}
    hooks = [hook_of(layer) for layer in sorted(numbers)]
    source = random_copy(options.stores / "random-model") if name == "random" else "smollm2-135m"
    model = sf.load_model(source)
    tokens = python_sources(model.tokenizer, max_tokens=round(1.15 * options.tokens))
    stream = sf.ActivationStream.from_model(model, tokens, hooks=hooks)
    sf.cache_activations(
        stream, store, n_tokens=options.tokens, held_out_tokens=40_000, resume=store.exists()
    )
    return store


def main(options: Options) -> None:
    done = {
        (row["model"], row["hook_name"])
        for row in read_rows(options.out)
        if row["stage"] == "whole"
    }
    options.stores.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        store = cache(name, options)
        for layers in options.layers:
            hooks = [hook_of(layer) for layer in layers.split("+")]
            hook_name = group_name(hooks)
            if (name, hook_name) in done:
                continue
            count = sf.count_features(
                sf.ActivationStream.from_store(store, hooks=hooks),
                hook_name=hooks,
                n_tokens=options.tokens,
                picks=options.picks,
                expansion_factors=options.expansion_factors,
                saes=False,
            )
            print(count, flush=True)
            answer: dict[str, Any] = {
                "estimate": round(count.estimate, 1),
                "low": round(count.low, 1),
                "high": round(count.high, 1),
                "identifiable": count.identifiable,
                "twice_load": round(2 * count.load, 4),
            }
            for step in count.steps:
                row: dict[str, Any] = where(torch.device("cpu"))
                row |= {"model": name, "hook_name": hook_name}
                for key, value in asdict(step).items():
                    row[key] = round(value, 4) if isinstance(value, float) else value
                last = step is count.steps[-1]
                write_row(options.out, row | (answer if last else dict.fromkeys(answer, "")))


if __name__ == "__main__":
    main(tyro.cli(Options))
