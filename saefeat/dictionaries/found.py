"""What a reader of files found in a folder, and the dictionary that it makes of it."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saefeat.dictionaries.base import Dictionary, Origin
from saefeat.dictionaries.registry import ARCHITECTURES


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
    config = _build(kind.config_type, found.config, found.path)
    origin = _build(Origin, found.origin, found.path)
    # Shapes first: a lying config must not make matrices of its own size.
    if decoder.shape[0] != d_sae or encoder.shape != (d_in, d_sae):
        raise ValueError(
            f"W_enc {list(encoder.shape)} and W_dec {list(decoder.shape)} in {found.path} do not "
            f"fit d_in={d_in} and d_sae={d_sae}."
        )
    d_out = decoder.shape[1] if found.is_transcoder else None
    dictionary = kind(config, d_in, d_sae, origin, d_out)
    _check_shapes(dictionary, found)
    if not (found.takes_b_dec_from_input or found.is_transcoder):
        _take_b_dec(found.tensors)
    dictionary.fill(found.tensors)
    return dictionary.to(decoder.dtype)


def _take_b_dec(tensors: dict[str, Tensor]) -> None:
    """Rewrite an encoder of x as the same encoder of x - b_dec."""
    shift = tensors["b_dec"].float() @ tensors["W_enc"].float()
    for name, factor in (("b_enc", None), ("b_gate", None), ("b_mag", "r_mag")):
        if name in tensors:
            moved = shift if factor is None else shift * tensors[factor].float().exp()
            tensors[name] = (tensors[name].float() + moved).to(tensors[name].dtype)


def _build(owner: type[Any], values: dict[str, Any], path: Path) -> Any:
    unknown = set(values) - {field.name for field in fields(owner)}
    if unknown:
        raise ValueError(
            f"{path} has the unknown key {sorted(unknown)[0]!r} for {owner.__name__}. "
            "It was written by another version of saefeat."
        )
    # JSON has lists alone; the configs, which are frozen, have tuples.
    made = {key: tuple(one) if isinstance(one, list) else one for key, one in values.items()}
    for entry in fields(owner):
        _check_type(made.get(entry.name), entry.type, entry.name, path)
    return owner(**made)


def _check_type(value: object, annotation: object, name: str, path: Path) -> None:
    """Refuse a text where a number belongs, and the like, before it fails somewhere deeper."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and annotation in (int, float) and not is_number:
        raise ValueError(f"{name} in {path} should be a number, found {value!r}.")


def _check_shapes(dictionary: Dictionary, found: Found) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in dictionary.file_tensors().items()}
    if set(found.tensors) != set(wanted):
        raise ValueError(
            f"{found.path} holds {sorted(found.tensors)}; a dictionary of kind "
            f"{dictionary.architecture!r} has {sorted(wanted)}."
        )
    for name, shape in wanted.items():
        tensor = found.tensors[name]
        if list(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} in {found.path} has shape {list(tensor.shape)} and dtype {tensor.dtype}; "
                f"d_in and d_sae call for {shape}, of a floating-point dtype."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} in {found.path} holds NaN or infinity.")
