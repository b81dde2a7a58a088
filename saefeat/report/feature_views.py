"""What a report shows of single latents, and the files that it is kept in.

Shape letters: m latents that are shown, b bins, k contexts, w tokens in a window, j neighbours,
t promoted tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.core.files import read_json, read_tensors, write_json, write_tensors
from saefeat.metrics.contexts import NO_TOKEN

TENSORS, TEXTS = "feature_views.safetensors", "tokens.json"
"""The files, beside `report.json`."""
LOWEST_LOG2, BINS_PER_OCTAVE, N_BINS = -8, 2, 48
"""Bins of activations: half octaves from 2^-8 up to 2^16; the outer ones take what lies beyond."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FeatureViews:
    """Some latents of one dictionary, the most frequent first."""

    latents: Int[Tensor, " m"]
    """Their numbers."""
    densities: Float[Tensor, " m"]
    """Share of the tokens that each is on for."""
    means: Float[Tensor, " m"]
    """Mean activation where it is on."""
    highest: Float[Tensor, " m"]
    """Highest activation."""
    histogram: Int[Tensor, "m b"]
    """Tokens by activation, where it is on; see `N_BINS`."""
    tokens: Int[Tensor, "k m w"]
    """Ids of the tokens around the highest activations, `NO_TOKEN` where there is none.
    k is 0 where activations have no tokens."""
    activations: Float[Tensor, "k m w"]
    """The activation at each of them."""
    neighbours: Int[Tensor, "m j"]
    """Latents whose decoder rows are nearest."""
    cosines: Float[Tensor, "m j"]
    """And their cosines."""
    promoted: Int[Tensor, "m t"]
    """Ids of the tokens that it promotes; t is 0 where that cannot be told."""
    logits: Float[Tensor, "m t"]
    """And by how much; see `metrics.unembedding`."""

    @property
    def token_ids(self) -> set[int]:
        """All tokens that are shown."""
        return {*self.tokens.unique().tolist(), *self.promoted.unique().tolist()} - {NO_TOKEN}


def write_views(
    folder: Path, views: Mapping[str, FeatureViews], token_texts: Mapping[int, str]
) -> None:
    """Write what is shown of each dictionary, and the text of the tokens."""
    write_tensors(
        folder / TENSORS,
        {
            f"{name}/{field.name}": getattr(one, field.name)
            for name, one in views.items()
            for field in fields(one)
        },
    )
    write_json(folder / TEXTS, {str(number): text for number, text in token_texts.items()})


def read_views(
    folder: Path, n_shown: Mapping[str, int], d_sae: Mapping[str, int]
) -> tuple[dict[str, FeatureViews], dict[int, str]]:
    """What `write_views` wrote.

    Args:
        folder: Where the files are.
        n_shown: How many latents of each dictionary the report says are shown.
        d_sae: How many each has.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or does not belong to the report.
    """
    tensors = read_tensors(folder / TENSORS)
    names = [field.name for field in fields(FeatureViews)]
    expected = {f"{label}/{name}" for label in n_shown for name in names}
    if set(tensors) != expected or not set(n_shown) <= set(d_sae):
        raise ValueError(
            f"{folder / TENSORS} does not hold the dictionaries that report.json lists, or not all "
            "that is shown of them. Are the files of one report?"
        )
    views = {}
    for label, m in n_shown.items():
        own = {name: tensors[f"{label}/{name}"] for name in names}
        fault = _fault(own, m, d_sae[label])
        if fault:
            raise ValueError(f"{folder / TENSORS} is damaged: of {label}, {fault}.")
        views[label] = FeatureViews(**own)
    texts = read_json(folder / TEXTS)
    if not isinstance(texts, dict) or not all(
        key.isdecimal() and isinstance(text, str) for key, text in texts.items()
    ):
        raise ValueError(f"{folder / TEXTS} is damaged: it does not map numbers to texts.")
    return views, {int(key): text for key, text in texts.items()}


def _fault(tensors: Mapping[str, Tensor], m: int, d_sae: int) -> str | None:
    """What is wrong with tensors that a file held; None where nothing is."""
    k, w = (tensors["tokens"].shape[axis] if tensors["tokens"].ndim == 3 else 0 for axis in (0, 2))
    lists = (tensors["neighbours"], tensors["promoted"])
    j, t = (one.shape[-1] if one.ndim else 0 for one in lists)
    shapes = {
        **dict.fromkeys(("latents", "densities", "means", "highest"), (m,)),
        "histogram": (m, N_BINS),
        **dict.fromkeys(("tokens", "activations"), (k, m, w)),
        **dict.fromkeys(("neighbours", "cosines"), (m, j)),
        **dict.fromkeys(("promoted", "logits"), (m, t)),
    }
    lowest = {"latents": 0, "neighbours": 0, "histogram": 0, "promoted": 0, "tokens": NO_TOKEN}
    for name, shape in shapes.items():
        tensor = tensors[name]
        dtype = torch.int32 if name in lowest else torch.float32
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            return f"{name} is {tensor.dtype} {list(tensor.shape)} and not {dtype} {list(shape)}"
        if not tensor.isfinite().all():
            return f"{name} holds NaN or infinity"
        limit = d_sae if name in ("latents", "neighbours") else math.inf
        if name in lowest and ((tensor < lowest[name]) | (tensor >= limit)).any():
            return f"{name} holds numbers out of range"
    if (tensors["highest"] <= 0).any() or (tensors["activations"] < 0).any():
        return "a latent that fired has no activation above 0"
    return None
