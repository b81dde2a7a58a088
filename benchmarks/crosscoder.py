"""A crosscoder against a BatchTopK dictionary of each of its layers: time, features and L0.

Step: a crosscoder of all layers and a bank of one dictionary for each layer take turns at a step
on the same batches, at equal d_sae and k. They have equally many weights; the crosscoder has one
set of codes, with decoder rows as long as all layers.

    python benchmarks/crosscoder.py step --out benchmarks/results/crosscoder_step.csv

- over_per_layer: median over the rounds of the crosscoder's time over that of the bank.

Features: on SmolLM2-135M reading the sources of Python's standard library, per-layer dictionaries
of one k, and crosscoders of several k (and widths), are trained on the same tokens and measured
on the same held-out tokens. Of the crosscoders of a width, L0 and alive latents are interpolated
(linearly in the logarithms) to the FVU of the per-layer dictionaries; where that lies outside of
what their k gave, nothing is reported and more --ks are needed.

    python benchmarks/crosscoder.py features --out benchmarks/results/crosscoder_features.csv

One row for each bank, and one ("at equal FVU") for each width of crosscoders:

- fvu: mean over the layers of the FVU at each.
- features: latents alive on the held-out tokens, of all layers together.
- l0: latents on per token, of all layers together.
- reuse, effective_layers: see `saefeat.metrics`; of per-layer dictionaries they are 1.
- fewer_features, fewer_l0: per-layer number over that of the crosscoder at equal FVU. Lindsey et
  al. 2024 report about 8 times fewer features for 18 layers at equal loss, at about 2 times the
  training FLOPs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tyro
from machine import in_turn, ratio, where, write_row
from rows import python_sources, structured_batches

import saefeat as sf
from saefeat.core.devices import fastest_dtype, resolve_device
from saefeat.kernels.dispatch import choose_kernels
from saefeat.training.bank_learner import BankLearner
from saefeat.training.new_bank import blank_dictionaries


@dataclass
class StepOptions:
    out: Path = Path("crosscoder_step.csv")
    device: str = "auto"
    batch: int = 2048
    d_in: int = 576
    layers: tuple[int, ...] = (2, 4, 8)
    """Numbers of layers to span."""
    width: float = 4
    """Expansion factor, of the crosscoder as of each dictionary."""
    k: int = 32
    rounds: int = 7
    warm_up: int = 2
    """Rounds before those that count."""


@dataclass
class FeatureOptions:
    out: Path = Path("crosscoder_features.csv")
    store: Path | None = None
    """Stored activations (`real_layers.py` makes some) in place of a pass through the model."""
    device: str = "auto"
    layers: tuple[int, ...] = (3, 9, 15, 21, 27)
    tokens: int = 2_000_000
    held_out_tokens: int = 50_000
    batch: int = 2048
    width: float = 4
    """Expansion factor of the per-layer dictionaries."""
    k: int = 32
    """Latents on per token and layer, of the per-layer dictionaries."""
    widths: tuple[float, ...] = (4, 8)
    """Expansion factors of the crosscoders, by the width of one layer."""
    ks: tuple[int, ...] = (32, 64, 128, 256)
    """Latents on per token of the crosscoders."""
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """A bank on held-out tokens."""

    fvu: float
    features: float
    l0: float
    reuse: float = 1.0
    effective_layers: float = 1.0


def main(options: StepOptions | FeatureOptions) -> None:
    if isinstance(options, StepOptions):
        for n_layers in options.layers:
            compare_steps(n_layers, options)
    else:
        compare_features(options)


def compare_steps(n_layers: int, options: StepOptions) -> None:
    """Measure one span and write its row."""
    device = resolve_device(options.device)
    hooks = [f"blocks.{layer}" for layer in range(n_layers)]
    rows = {
        hook: structured_batches(2, options.batch, options.d_in, seed=layer)
        for layer, hook in enumerate(hooks)
    }
    batches = [{hook: own[i].to(device) for hook, own in rows.items()} for i in range(2)]
    stream = sf.ActivationStream.from_tensors(batches[0], batch_size=options.batch)
    learners = {
        name: BankLearner(
            blank_dictionaries(stream, config, [options.width], [0], None),
            n_tokens=10**9,
            n_steps=10**5,
            device=device,
            kernels=choose_kernels("auto", device)[1],
            selection_dtype=fastest_dtype(device),
        )
        for name, config in (
            ("crosscoder", sf.CrosscoderConfig(k=options.k)),
            ("per layer", sf.BatchTopKConfig(k=options.k)),
        )
    }
    seconds = in_turn(
        {
            name: lambda step, one=one: one.step(batches[step % len(batches)])
            for name, one in learners.items()
        },
        rounds=options.rounds,
        warm_up=options.warm_up,
        device=device,
    )
    for name in learners:
        row = {
            **where(device),
            "batch": options.batch,
            "d_in": options.d_in,
            "layers": n_layers,
            "d_sae": round(options.width * options.d_in),
            "k": options.k,
            "rounds": options.rounds,
            "contestant": name,
            "ms": f"{1e3 * sorted(seconds[name])[options.rounds // 2]:.2f}",
            "over_per_layer": f"{ratio(seconds[name], seconds['per layer']):.3f}",
        }
        write_row(options.out, row)


def compare_features(options: FeatureOptions) -> None:
    """Train and measure every bank, and compare those of crosscoders with the per-layer one."""
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in options.layers]
    if options.store is None:
        stream = model_stream(hooks, options)
    else:
        stream = sf.ActivationStream.from_store(
            options.store, hooks=hooks, batch_size=options.batch, seed=options.seed
        )
    per_layer = measured(stream, sf.BatchTopKConfig(k=options.k), options.width, options)
    write(options, "per layer", options.width, options.k, per_layer)
    for width in options.widths:
        found = []
        for k in options.ks:
            one = measured(stream, sf.CrosscoderConfig(k=k), width, options)
            write(options, "crosscoder", width, k, one)
            found.append(one)
        equal = at_fvu(found, per_layer.fvu)
        if equal is None:
            print(f"No two of --ks {options.ks} enclose FVU {per_layer.fvu:.4f} at width {width}.")
        else:
            write(options, "at equal FVU", width, "", equal, per_layer)


def model_stream(hooks: list[str], options: FeatureOptions) -> sf.ActivationStream:
    """The activations of SmolLM2 on the standard library's sources."""
    model = sf.load_model("smollm2-135m", device=options.device)
    n_needed = options.tokens + options.held_out_tokens
    tokens = python_sources(
        model.tokenizer,
        max_tokens=int(1.2 * n_needed) + 256,
        held_out_fraction=1.1 * options.held_out_tokens / (1.2 * n_needed),
    )
    return sf.ActivationStream.from_model(
        model, tokens, hooks, batch_size=options.batch, seed=options.seed
    )


def measured(
    stream: sf.ActivationStream,
    config: sf.BatchTopKConfig,
    width: float,
    options: FeatureOptions,
) -> Measured:
    """Train a bank on the stream and measure it on what was held out."""
    bank = sf.train(
        stream,
        config,
        expansion_factors=[width],
        seeds=[options.seed],
        n_tokens=options.tokens,
        device=options.device,
    )
    rows = sf.measure(bank, stream, n_tokens=options.held_out_tokens).rows
    fvus = [fvu for row in rows for fvu in (row.fvu_by_hook or {"": row.fvu}).values()]
    profile = rows[0].layer_profile or {"reuse": 1.0, "effective_layers": 1.0}
    return Measured(
        fvu=sum(fvus) / len(fvus),
        features=sum(row.n_alive for row in rows),
        l0=sum(row.l0 for row in rows),
        reuse=profile["reuse"],
        effective_layers=profile["effective_layers"],
    )


def at_fvu(found: Sequence[Measured], fvu: float) -> Measured | None:
    """What lies between the two of `found`, in their order, that enclose `fvu`."""
    for first, second in pairwise(found):
        if min(first.fvu, second.fvu) <= fvu <= max(first.fvu, second.fvu):
            share = math.log(fvu / first.fvu) / math.log(second.fvu / first.fvu)

            def between(name: str, a: Measured = first, b: Measured = second, t=share) -> float:
                return math.exp(
                    (1 - t) * math.log(getattr(a, name)) + t * math.log(getattr(b, name))
                )

            names = ("features", "l0", "reuse", "effective_layers")
            return Measured(fvu=fvu, **{name: between(name) for name in names})
    return None


def write(
    options: FeatureOptions,
    contestant: str,
    width: float,
    k: int | str,
    one: Measured,
    per_layer: Measured | None = None,
) -> None:
    """One row."""
    device = resolve_device(options.device)
    row = {
        **where(device),
        "layers": " ".join(map(str, options.layers)),
        "tokens": options.tokens,
        "contestant": contestant,
        "width": width,
        "k": k,
        "fvu": f"{one.fvu:.4f}",
        "features": f"{one.features:.0f}",
        "l0": f"{one.l0:.1f}",
        "reuse": f"{one.reuse:.3f}",
        "effective_layers": f"{one.effective_layers:.3f}",
        "fewer_features": "" if per_layer is None else f"{per_layer.features / one.features:.2f}",
        "fewer_l0": "" if per_layer is None else f"{per_layer.l0 / one.l0:.2f}",
    }
    write_row(options.out, row)


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({"step": StepOptions, "features": FeatureOptions}))
