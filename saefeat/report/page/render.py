"""The page of a report: one HTML file that needs no network and runs nothing but its own code."""

import base64
import hashlib
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, StrictUndefined

from saefeat.metrics.contexts import NO_TOKEN
from saefeat.report.feature_views import BINS_PER_OCTAVE, LOWEST_LOG2, FeatureViews
from saefeat.report.page.summary import certainty, conclusions, per_neuron
from saefeat.report.plots import density_bins, log_densities
from saefeat.report.record import COLUMNS, Report, Row

SCRIPTS = ("elements.js", "charts.js", "features.js")
FINEST = 255
"""Steps of an activation, as a share of the highest of its latent, in which it is drawn."""


def render(report: Report) -> str:
    """The page as HTML.

    All text from outside (tokens, names of models and hooks) is either escaped by the template or
    is JSON, in which `<`, `>` and `&` are escaped too and which scripts put in as text only. The
    content security policy allows the page's own scripts, by their hashes, and nothing else.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"certainty": certainty, "per_neuron": per_neuron}
    style, scripts = _read("page.css"), [_read(name) for name in SCRIPTS]
    return environment.from_string(_read("page.html")).render(
        report=report,
        columns=list(COLUMNS),
        addresses=[address(row) for row in report.rows],
        conclusions=conclusions(report),
        style=style,
        scripts=scripts,
        style_hash=_hash(style),
        script_hashes=[_hash(script) for script in scripts],
        data=_data(report),
    )


def address(row: Row) -> str:
    """What links call a dictionary; "/feature<number>" behind it is one of its latents."""
    return f"{row.hook_name}/x{row.expansion_factor:g}/seed{row.seed}"


def _data(report: Report) -> dict[str, Any]:
    """What the scripts draw."""
    bins = density_bins(report.n_tokens)
    shown = set().union(*(views.token_ids for views in report.views.values()))
    vocabulary = np.array(sorted(shown), dtype=np.int64)
    return {
        "n_tokens": report.n_tokens,
        "layers": [asdict(layer) for layer in report.layers],
        "bins": {
            "density": [bins[0], bins[-1]],
            "lowest_log2": LOWEST_LOG2,
            "per_octave": BINS_PER_OCTAVE,
        },
        "vocabulary": [report.token_texts.get(number, f"#{number}") for number in vocabulary],
        "dictionaries": [
            asdict(row)
            | {
                "address": address(row),
                "histogram": np.histogram(
                    log_densities(report.densities[row.label], bins), bins=bins
                )[0].tolist(),
                "views": _views(report.views[row.label], vocabulary)
                if row.label in report.views
                else None,
            }
            for row in report.rows
        ],
    }


def _views(views: FeatureViews, vocabulary: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Arrays as base64, tokens as places in `vocabulary` (behind its end where there is none).

    That takes 4 bytes for a token with its activation, where numbers in JSON take about 10.
    """
    short = np.dtype("<u2" if len(vocabulary) < 2**16 else "<u4")

    def places(ids: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        found = np.searchsorted(vocabulary, ids)
        return np.where(ids == NO_TOKEN, len(vocabulary), found).astype(short)

    k, m, w = views.tokens.shape
    highest = views.highest.numpy()[:, None, None]
    shares = views.activations.numpy().transpose(1, 0, 2) / highest
    arrays = {
        "latents": views.latents.numpy().astype("<u4"),
        "densities": views.densities.numpy().astype("<f4"),
        "means": views.means.numpy().astype("<f4"),
        "highest": views.highest.numpy().astype("<f4"),
        "histogram": views.histogram.numpy().astype("<u4"),
        "tokens": places(views.tokens.numpy().transpose(1, 0, 2)),
        # Rounded up, so that what is on is never drawn as off.
        "shares": np.ceil(shares * FINEST).clip(0, FINEST).astype("u1"),
        "neighbours": views.neighbours.numpy().astype("<u4"),
        "cosines": views.cosines.numpy().astype("<f4"),
        "promoted": places(views.promoted.numpy()),
        "logits": views.logits.numpy().astype("<f4"),
    }
    sizes = {"n_contexts": k, "window": w, "n_shown": m}
    return sizes | {
        name: [array.dtype.str[1:], base64.b64encode(array.tobytes()).decode()]
        for name, array in arrays.items()
    }


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
