"""Reports as large as they get, with text as bad as it gets, made without a language model."""

import torch

import saefeat as sf
from saefeat.report.feature_views import N_BINS, FeatureViews
from saefeat.report.record import QUANTILES, Layer, Row, label

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>&lt;&amp;",
    "'\"`${1}",
    "\u2028\u2029",
    "\x00\ufffd\u202e",
    "\n\t ",
    "Größe",
]
"""The texts of the first tokens."""
N_TOKENS = 100_000
D_IN = 1152


def synthetic_report(
    hooks, *, factors=(4,), seeds=(0,), n_shown=200, n_words=30_000, certainties=("alive",)
) -> sf.Report:
    """A report of these dictionaries; `certainties` go round the layers."""
    generator = torch.Generator().manual_seed(0)
    keys = [(hook, factor, seed) for hook in hooks for factor in factors for seed in seeds]
    return sf.Report(
        saefeat_version="0",
        model="model </title><script>alert(2)</script>",
        n_tokens=N_TOKENS,
        rows=[row(number, *key) for number, key in enumerate(keys)],
        layers=[layer(hook, certainties[i % len(certainties)]) for i, hook in enumerate(hooks)],
        left_out={"outlier_rows": 7, "positions_read": N_TOKENS + 7},
        cross_entropy={"clean": 3.2, "ablation": "zero", "n_tokens": 4096},
        densities={
            label(*key): 10 ** (-5 * torch.rand(D_IN * key[1], generator=generator)) for key in keys
        },
        views={label(*key): views(n_shown, D_IN * key[1], n_words, generator) for key in keys},
        token_texts={i: HOSTILE[i] if i < len(HOSTILE) else f" word{i}" for i in range(n_words)},
    )


def row(number, hook, factor, seed) -> Row:
    d_sae = D_IN * factor
    return Row(
        hook_name=hook,
        target_hook_name=hook,
        layer=int(hook.split(".")[1]),
        architecture="topk",
        d_in=D_IN,
        n_neurons=D_IN,
        d_sae=d_sae,
        expansion_factor=factor,
        seed=seed,
        l0=32.0,
        n_alive=d_sae - number,
        dead_fraction=number / d_sae,
        n_ultralow=0,
        features_per_neuron=factor * (1 - number / d_sae),
        effective_features=d_sae / 2,
        fvu=0.1 + 0.01 * number,
        explained_variance=0.9 - 0.01 * number,
        normalized_mse=0.1,
        ce_loss_spliced=3.3,
        ce_loss_ablated=9.0,
        ce_loss_recovered=0.98,
        density_quantiles={str(q): -3 + q for q in QUANTILES},
    )


def layer(hook, certainty) -> Layer:
    counted, bounded = certainty == "counted", certainty == "bounded"
    return Layer(
        hook_name=hook,
        n_neurons=100,
        n_features={
            "estimate": 250.0,
            "low": 250.0 if bounded else 240.0,
            "high": None if bounded else 270.0,
            "method": "matching pursuit",
        },
        features_per_neuron=2.5,
        coverage={"counted": 0.99, "bounded": 0.5}.get(certainty),
        load=0.3,
        identifiable={"counted": True, "bounded": False}.get(certainty),
        width_curve=[{"d_sae": 100, "n_features": 90}, {"d_sae": 400, "n_features": 250}]
        if counted
        else [],
    )


def views(m, d_sae, n_words, generator, k=5, w=25) -> FeatureViews:
    shape = (k, m, w)
    activations = torch.rand(shape, generator=generator) * (
        torch.rand(shape, generator=generator) < 0.3
    )
    activations[:, :, 16] = torch.linspace(9, 8, k)[:, None]
    tokens = torch.randint(0, n_words, shape, generator=generator, dtype=torch.int32)
    tokens[:, :, 0] = -1
    tokens[:, 0, 16] = torch.arange(k)  # the most frequent latent peaks at hostile tokens
    return FeatureViews(
        latents=torch.randperm(d_sae, generator=generator)[:m].int(),
        densities=torch.logspace(-1, -5, m),
        means=torch.rand(m, generator=generator) + 1,
        highest=torch.full((m,), 9.0),
        histogram=torch.randint(0, 999, (m, N_BINS), generator=generator, dtype=torch.int32),
        tokens=tokens,
        activations=activations,
        neighbours=torch.randint(0, d_sae, (m, 5), generator=generator, dtype=torch.int32),
        cosines=torch.rand(m, 5, generator=generator),
        promoted=torch.randint(0, n_words, (m, 8), generator=generator, dtype=torch.int32),
        logits=torch.rand(m, 8, generator=generator),
    )
