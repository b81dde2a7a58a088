"""Does the joint number of features grow with the layers that are taken together?

    python benchmarks/joint_counts.py --out benchmarks/results/joint_counts.csv

Residual streams of tiny-a (8 layers of width 48, which comes with saefeat) and of a model of its
shape with random weights, on the sources of Python's standard library. Spans of one, two and four
neighbouring layers, disjoint among those of a length, are counted jointly by `count_features`,
and crosscoders of each are trained. Spans that the CSV has already are left out.

- directions: that two random starts of matching pursuit share, each layer at one mean norm.
- low, high, identifiable: the answer of the count; where it is not identifiable, low alone says
  something.
- features, reuse, fvu: of a crosscoder on held-out rows; see `superposition.joint_features`.
- n_stable: features that crosscoders from two seeds have both found.

At the end the slopes of ln(features) on ln(neurons) are printed, see `metrics.feature_growth`: 0
where layers share all features, 1 where none, and above 1 where layers together hold more than
each by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import read_rows, where, write_row
from rows import python_sources

import saefeat as sf
from saefeat.models.zoo import A, random_model

N_LAYERS = 8


@dataclass
class Options:
    out: Path = Path("joint_counts.csv")
    stores: Path = Path("stores")
    """Where activations are kept: 1 GB a model at the defaults."""
    models: tuple[str, ...] = ("tiny-a", "random")
    spans: tuple[int, ...] = (1, 2, 4)
    """Numbers of layers that are taken together."""
    tokens: int = 300_000
    picks: tuple[int, ...] = (1, 2)
    expansion_factors: tuple[float, ...] = (2, 4)
    """Atoms per neuron of the span, to choose from."""
    k: int = 8
    """Latents of a crosscoder that are on per row."""
    width: float = 8
    """Latents of a crosscoder per neuron of its span."""


def spans_of(options: Options) -> Iterator[range]:
    """Neighbouring layers, disjoint among those of a length."""
    for length in options.spans:
        for first in range(0, N_LAYERS - length + 1, length):
            yield range(first, first + length)


def hook_of(layer: int) -> str:
    """The residual stream after a block."""
    return f"blocks.{layer}.hook_resid_post"


def cache(name: str, options: Options) -> Path:
    """The store of a model's activations at all layers."""
    store = options.stores / name
    model = random_model(A) if name == "random" else sf.load_model(name)
    tokens = python_sources(model.tokenizer, 64, max_tokens=round(1.2 * options.tokens))
    hooks = [hook_of(layer) for layer in range(N_LAYERS)]
    stream = sf.ActivationStream.from_model(model, tokens, hooks=hooks)
    sf.cache_activations(
        stream, store, n_tokens=options.tokens, held_out_tokens=40_000, resume=store.exists()
    )
    return store


def measured(store: Path, span: range, options: Options) -> dict[str, Any]:
    """The count of a span and its crosscoder."""
    hooks = [hook_of(layer) for layer in span]
    stream = sf.ActivationStream.from_store(store, hooks=hooks)
    count = sf.count_features(
        stream,
        hook_name=hooks,
        n_tokens=options.tokens,
        picks=options.picks,
        expansion_factors=options.expansion_factors,
        saes=False,
    )
    print(count, flush=True)
    # Its d_sae is by the mean width of a hook.
    bank = sf.train(
        stream,
        sf.CrosscoderConfig(k=options.k),
        expansion_factors=[options.width * len(hooks)],
        seeds=[0, 1],
        n_tokens=2 * options.tokens,
    )
    (sae_count,) = sf.sae_counts(bank, stream, n_tokens=40_000)
    row, _ = sf.measure(bank, stream, n_tokens=40_000).rows
    profile = row.layer_profile or {}
    return {
        "directions": count.last_step.n_features,
        "low": round(count.low, 1),
        "high": round(count.high, 1),
        "identifiable": count.identifiable,
        "coverage": round(count.coverage, 4),
        "features": profile["n_features"],
        "n_stable": sae_count.distinct.n_stable,
        "reuse": round(profile["reuse"], 3),
        "fvu": round(row.fvu, 4),
    }


def print_slopes(rows: list[dict[str, str]]) -> None:
    """Of each model, for each number of features."""
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        neurons = [int(row["n_neurons"]) for row in own]
        for features in ("directions", "low", "features", "n_stable"):
            growth = sf.metrics.feature_growth([float(row[features]) for row in own], neurons)
            print(f"{name}, {features}: {growth.slope:.2f} +- {growth.standard_error:.2f}")


def main(options: Options) -> None:
    done = {(row["model"], row["first_layer"], row["n_layers"]) for row in read_rows(options.out)}
    options.stores.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        store = cache(name, options)
        for span in spans_of(options):
            if (name, str(span[0]), str(len(span))) in done:
                continue
            place = {"model": name, "first_layer": span[0], "n_layers": len(span)}
            neurons = {"n_neurons": A.d_model * len(span)}
            row = where(torch.device("cpu")) | place | neurons | measured(store, span, options)
            write_row(options.out, row)
    print_slopes(read_rows(options.out))


if __name__ == "__main__":
    main(tyro.cli(Options))
