"""What a report says of each layer: its features, as far as they have been counted."""

import math
import statistics
from collections.abc import Mapping, Sequence

import torch

from saefeat.metrics.sparsity import SparsityCounts, features_per_neuron
from saefeat.report.record import Estimate, Layer, Row
from saefeat.superposition.counting.feature_count import FeatureCount
from saefeat.superposition.estimators import LEAST_COVERAGE, SeedCounts
from saefeat.training.bank import Bank, Key

COUNTED = "matching pursuit from {} random starts (count_features)"
STABLE = "latents that two of {} seeds share at {:,} latents; biased low as the load grows"
ALIVE = "alive latents, the range over widths; one seed, so not a count of features"


def layer_summaries(
    bank: Bank,
    rows: Sequence[Row],
    sparsity: Mapping[Key, SparsityCounts],
    counts: Sequence[FeatureCount],
) -> list[Layer]:
    """One summary for each hook of the bank (for each set of hooks that crosscoders read).

    Raises:
        ValueError: A count is of a hook that the bank has no dictionary of, or two are of one.
    """
    names = list(dict.fromkeys(row.hook_name for row in rows))
    counted = {count.hook_name: count for count in counts}
    unknown = [name for name in counted if name not in names]
    if unknown or len(counted) < len(counts):
        raise ValueError(
            f"counts must be of hooks of the bank, one each: got {[c.hook_name for c in counts]}, "
            f"where the bank has {', '.join(names)}."
        )
    return [
        _from_count(counted[name]) if name in counted else _from_bank(name, bank, rows, sparsity)
        for name in names
    ]


def _from_count(count: FeatureCount) -> Layer:
    return Layer(
        hook_name=count.hook_name,
        n_neurons=count.n_neurons,
        n_features={
            "estimate": count.estimate,
            "low": count.low,
            "high": count.high if math.isfinite(count.high) else None,
            "method": COUNTED.format(len(count.seeds)),
        },
        features_per_neuron=count.per_neuron,
        coverage=count.coverage,
        load=count.load,
        identifiable=count.identifiable,
        width_curve=[
            {"d_sae": step.d_sae, "n_features": step.n_features} for step in count.width_curve
        ],
    )


def _from_bank(
    name: str, bank: Bank, rows: Sequence[Row], sparsity: Mapping[Key, SparsityCounts]
) -> Layer:
    own = [row for row in rows if row.hook_name == name]
    n_neurons = own[0].n_neurons
    keys = [key for key in bank if key[0] == name]
    loads = {
        key: float(torch.special.entr(sparsity[key].density).sum()) / n_neurons for key in keys
    }
    widest = [key for key in keys if key[1] == max(key[1] for key in keys)]
    if len(widest) < 2:
        alive = [float(row.n_alive) for row in own]
        estimate = statistics.median(alive)
        features = Estimate(estimate=estimate, low=min(alive), high=max(alive), method=ALIVE)
        coverage, identifiable = None, None
        used = keys
    else:
        seeds = SeedCounts.of(
            [bank[key].W_dec for key in widest], [sparsity[key].density > 0 for key in widest]
        )
        estimate, coverage, used = float(seeds.n_stable), seeds.coverage, widest
        identifiable = coverage is not None and coverage >= LEAST_COVERAGE
        features = Estimate(
            estimate=estimate,
            low=estimate,
            high=max(estimate, seeds.chao2_high) if identifiable else None,
            method=STABLE.format(len(widest), bank[widest[0]].d_sae),
        )
    return Layer(
        hook_name=name,
        n_neurons=n_neurons,
        n_features=features,
        features_per_neuron=features_per_neuron(estimate, n_neurons),
        coverage=coverage,
        load=statistics.median(loads[key] for key in used),
        identifiable=identifiable,
    )
