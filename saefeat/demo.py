"""The demo: a real model, one dictionary a layer, one pass, and what came out of it."""

from collections.abc import Sequence
from pathlib import Path

from saefeat.activations.stream import ActivationStream
from saefeat.core.files import check_unclaimed
from saefeat.dictionaries.topk import TopKConfig
from saefeat.job import read_text
from saefeat.models.load import load_model
from saefeat.models.packaged import quiet_transformers
from saefeat.report.measure import measure
from saefeat.report.record import Report
from saefeat.training.trainer import train

HELD_OUT_TOKENS = 8_192
"""Tokens that everything but the loss is measured on, or a quarter of the training if fewer."""
CE_TOKENS = 2_048
"""Tokens that the loss is measured on, each read once a dictionary and once a hook."""
CONTEXT_SIZE = 128
"""Tokens in a context, or as many as the model reads if fewer."""


def run_demo(
    *,
    model: str = "smollm2-135m",
    text: Path | None = None,
    layers: Sequence[int] | int = 6,
    tokens: int = 200_000,
    out: Path = Path("saefeat-demo"),
    progress: bool = True,
) -> Report:
    """Train TopK dictionaries on evenly spaced layers and measure them on held-out tokens.

    Args:
        model: As for `load_model`.
        text: A text file or folder; None for the sources of Python's standard library.
        layers: How many layers, evenly spaced from the first to the last, or which.
        tokens: Rows of activations to train on.
        out: A new folder for the run (`run/`) and the report (`report/`).
        progress: Whether to draw progress bars on standard error.

    Raises:
        FileExistsError: `out` already holds files.
        ValueError: A layer is not in the model, there are fewer than 8 tokens to train on, or
            the text is too short to hold some of it out.
    """
    if tokens < 8:
        raise ValueError(f"tokens={tokens} is too few to train on some and hold others out.")
    check_unclaimed(out)
    with quiet_transformers():
        language_model = load_model(model)
    chosen = _choose_layers(layers, language_model.cfg.n_layers)
    context_size = min(CONTEXT_SIZE, language_model.cfg.n_ctx)
    n_held_out = min(HELD_OUT_TOKENS, tokens // 4)
    # A tenth more for what is held out, a tenth for BOS, separators and attention sinks.
    n_read = max(int(tokens * 1.1), tokens + 2 * n_held_out) + 2 * context_size
    corpus = read_text(
        text,
        language_model,
        context_size=context_size,
        max_tokens=n_read,
        held_out_fraction=n_held_out / n_read,
    )
    if corpus.n_held_out == 0:
        raise ValueError(
            f"The text makes only one context of {context_size} tokens, so that none can be held "
            "out to measure on. Give more text."
        )
    stream = ActivationStream.from_model(
        language_model,
        corpus,
        hooks=[f"blocks.{layer}.hook_resid_post" for layer in chosen],
        # So short a run needs more steps than batches of the usual 4,096 would give, and larger
        # ones: over layers 0, 17 and 29 of SmolLM2, FVU fell from 0.20 to 0.14 on average.
        batch_size=512,
    )
    bank = train(
        stream,
        # At so low a rate a long decay only costs: FVU .116 for .109 at layer 0.
        TopKConfig(k=32, learning_rate=2e-3, decay_fraction=0.2),
        expansion_factors=[4],
        n_tokens=tokens,
        out=out / "run",
        progress=progress,
    )
    report = measure(
        bank,
        stream,
        n_tokens=n_held_out,
        model=language_model,
        ce_tokens=CE_TOKENS,
        progress=progress,
    )
    report.save(out / "report")
    return report


def conclusions(report: Report, n_tokens: int) -> str:
    """What a reader may conclude from so short a run, in words."""
    fvus = [row.fvu for row in report.rows]
    alive = [row.features_per_neuron for row in report.rows]
    width = report.rows[0].expansion_factor
    recovered = [row.ce_loss_recovered for row in report.rows if row.ce_loss_recovered is not None]
    spliced = (
        f" and put in a layer's place they keep {min(recovered):.0%} to {max(recovered):.0%} of "
        "what that layer does for the loss"
        if recovered
        else ""
    )
    return (
        f"After {n_tokens:,} tokens the dictionaries explain {1 - max(fvus):.0%} to "
        f"{1 - min(fvus):.0%} of the variance{spliced}. That is enough to see that the "
        "pipeline works and how layers differ. It is not a count of features: latents alive per "
        f"neuron ({min(alive):.1f} to {max(alive):.1f}) can never pass the width that was chosen "
        f"({width:g}), and move with k, width and tokens. Published dictionaries see a thousand "
        "times as many tokens."
    )


def _choose_layers(layers: Sequence[int] | int, n_layers: int) -> list[int]:
    if isinstance(layers, int):
        if not 1 <= layers <= n_layers:
            raise ValueError(f"The model has {n_layers} layers, so {layers} cannot be chosen.")
        last = n_layers - 1
        return sorted({round(i * last / max(layers - 1, 1)) for i in range(layers)})
    outside = [layer for layer in layers if not 0 <= layer < n_layers]
    if outside:
        raise ValueError(
            f"The model has no layer {outside[0]}; its {n_layers} layers are numbered from 0."
        )
    return sorted(set(layers))
