"""What a reader of files found in a folder, and the dictionary that it makes of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saefeat.core.records import from_json
from saefeat.dictionaries.base import Dictionary, Origin
from saefeat.dictionaries.registry import ARCHITECTURES

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that weights may have."""


@dataclass(kw_only=True)
class Found:
    """Weights by SAELens's names, and what the files say of them."""

    path: Path
    """The file or folder that errors are about."""
    architecture: str
    """One of `ARCHITECTURES`."""
    tensors: dict[str, Tensor]
    """`W_enc [d_in, d_sae]`, `W_dec [d_sae, d_out]`, `b_dec`, and those of the kind."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the kind's config; defaults for the others."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Fields of `Origin`."""
    d_in: int | None = None
    """As stated in the files; None to go by the weights."""
    d_sae: int | None = None
    """As stated in the files; None to go by the weights."""
    is_transcoder: bool = False
    """Whether b_dec is of another hook than the input."""
    takes_b_dec_from_input: bool = True
    """False for a dictionary whose encoder reads `x` rather than `x - b_dec`."""
    ranks_by_decoder_norm: bool = False
    """Whether a latent ranks by its score times the norm of its row."""


def build(found: Found) -> Dictionary:
    """The dictionary, in the dtype of its decoder.

    Raises:
        ValueError: The architecture, a key, a shape or a number is not known or does not fit.
    """
    kind = ARCHITECTURES.get(found.architecture)
    if kind is None:
        raise ValueError(
            f"{found.path} names the architecture {found.architecture!r}; "
            f"known are {', '.join(sorted(ARCHITECTURES))}."
        )
    decoder = found.tensors.get("W_dec")
    if decoder is None or decoder.ndim != 2:
        raise ValueError(f"{found.path} holds {sorted(found.tensors)} and no matrix W_dec.")
    encoder = found.tensors.get("W_enc", decoder.T)
    if encoder.ndim != 2:
        raise ValueError(f"W_enc in {found.path} has shape {list(encoder.shape)}, not 2 axes.")
    d_in = encoder.shape[0] if found.d_in is None else found.d_in
    d_sae = decoder.shape[0] if found.d_sae is None else found.d_sae
    config = from_json(kind.config_type, found.config, found.path)
    origin = from_json(Origin, found.origin, found.path)
    if origin.hook_widths is not None and not kind.reads_several_hooks:
        raise ValueError(f"{found.path} has hook_widths, and a {kind.__name__} reads one hook.")
    # Shapes first: a lying config must not make matrices of its own size.
    fits = decoder.shape[0] == d_sae and encoder.shape == (d_in, d_sae)
    if not fits or 0 in (d_in, *decoder.shape):
        raise ValueError(
            f"W_enc {list(encoder.shape)} and W_dec {list(decoder.shape)} in {found.path} do not "
            f"fit d_in={d_in} and d_sae={d_sae}."
        )
    d_out = decoder.shape[1] if found.is_transcoder else None
    dictionary = kind(config, d_in, d_sae, origin, d_out)
    _check_shapes(dictionary, found)
    dictionary.to(decoder.dtype)
    if not (found.takes_b_dec_from_input or found.is_transcoder):
        _take_b_dec(found.tensors)
    if found.ranks_by_decoder_norm:
        _move_decoder_norms(found.tensors)
    for name, tensor in found.tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} in {found.path} holds NaN or infinity, or what leads to it.")
    dictionary.fill(found.tensors)
    return dictionary


def _take_b_dec(tensors: dict[str, Tensor]) -> None:
    """Rewrite an encoder of x as the same encoder of x - b_dec."""
    wide = torch.promote_types(tensors["W_enc"].dtype, torch.float32)
    shift = tensors["b_dec"].to(wide) @ tensors["W_enc"].to(wide)
    for name, factor in (("b_enc", None), ("b_gate", None), ("b_mag", "r_mag")):
        if name in tensors:
            moved = shift if factor is None else shift * tensors[factor].to(wide).exp()
            tensors[name] = (tensors[name] + moved).to(tensors[name].dtype)


def _move_decoder_norms(tensors: dict[str, Tensor]) -> None:
    """Rank by score times decoder norm, as rows of length 1 do by themselves."""
    norms = tensors["W_dec"].norm(dim=1)
    tensors["W_enc"] = tensors["W_enc"] * norms
    tensors["b_enc"] = tensors["b_enc"] * norms
    tensors["W_dec"] = tensors["W_dec"] / torch.where(norms > 0, norms, 1)[:, None]


def _check_shapes(dictionary: Dictionary, found: Found) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in dictionary.file_tensors().items()}
    if set(found.tensors) != set(wanted):
        raise ValueError(
            f"{found.path} holds {sorted(found.tensors)}; a dictionary of kind "
            f"{dictionary.architecture!r} has {sorted(wanted)}."
        )
    for name, shape in wanted.items():
        tensor = found.tensors[name]
        if list(tensor.shape) != shape or tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} in {found.path} has shape {list(tensor.shape)} and dtype {tensor.dtype}; "
                f"d_in and d_sae call for {shape}, of a floating-point dtype of 16 bits or more."
            )
