"""Files of dictionaries, in the layout of SAELens.

A folder holds `cfg.json` and `sae_weights.safetensors`, which `sae_lens.SAE.load_from_disk` opens
as its own, and `saefeat.json` with what SAELens has no field for.
"""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saefeat.core.files import (
    claim_folder,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from saefeat.dictionaries.base import Dictionary, Origin
from saefeat.dictionaries.registry import ARCHITECTURES

LAYOUT_VERSION = "6.54.12"
"""The SAELens release whose layout is written, and that the tests open it with."""

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def save(dictionary: Dictionary, folder: Path) -> Path:
    """Write `dictionary` into a new or empty folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder already holds files.
        ValueError: A weight is not finite.
    """
    tensors = dictionary.file_tensors()
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} of the dictionary of {dictionary.hook_name!r} holds NaN or infinity, so "
                "it is not saved. Its training diverged: lower the learning rate."
            )
    claim_folder(folder, what="dictionary")
    write_tensors(folder / "sae_weights.safetensors", tensors)
    write_json(
        folder / "saefeat.json",
        {
            "architecture": dictionary.architecture,
            "config": asdict(dictionary.config),
            "origin": asdict(dictionary.origin),
        },
    )
    # Last, so that a folder with a cfg.json is a whole one.
    write_json(folder / "cfg.json", _sae_lens_config(dictionary))
    return folder


def load_dictionary(folder: str | Path) -> Dictionary:
    """Open a folder that `Dictionary.save` or SAELens wrote.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no dictionary.
        ValueError: A file is damaged, or its architecture, keys or shapes are not known.
    """
    folder = Path(folder)
    if not (folder / "cfg.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no dictionary: cfg.json is missing. Expected a folder that "
            "Dictionary.save or SAELens wrote, with cfg.json and sae_weights.safetensors."
        )
    written = _mapping(read_json(folder / "cfg.json"), folder / "cfg.json")
    own: dict[str, Any] = {
        "architecture": written.get("architecture"),
        "config": {},
        "origin": _origin_of_sae_lens(written),
    }
    if (folder / "saefeat.json").is_file():
        own = _mapping(read_json(folder / "saefeat.json"), folder / "saefeat.json")
    kind = ARCHITECTURES.get(str(own.get("architecture")))
    if kind is None:
        raise ValueError(
            f"{folder} names the architecture {own.get('architecture')!r}; "
            f"known are {', '.join(sorted(ARCHITECTURES))}."
        )
    config = _build(kind.config_type, {**_shared_keys(kind, written), **own["config"]}, folder)
    origin = _build(Origin, own["origin"], folder)
    try:
        d_in, d_sae = int(written["d_in"]), int(written["d_sae"])
        d_out = None if written.get("d_out") is None else int(written["d_out"])
        dictionary = kind(config, d_in, d_sae, origin, d_out)
    except KeyError as error:
        raise ValueError(f"{folder / 'cfg.json'} lacks the key {error}.") from error
    _fill(dictionary, read_tensors(folder / "sae_weights.safetensors"), folder)
    return dictionary.to(_DTYPES[str(written.get("dtype", "float32"))])


def _sae_lens_config(dictionary: Dictionary) -> dict[str, object]:
    origin = dictionary.origin
    return {
        "architecture": dictionary.sae_lens_architecture,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "dtype": str(dictionary.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        **dictionary.sae_lens_fields,
        "metadata": {
            "model_name": origin.model_name,
            "hook_name": origin.hook_name,
            "hook_head_index": None,
            "context_size": origin.context_size,
            "prepend_bos": origin.prepend_bos,
            "seqpos_slice": [None],
            "dataset_path": None,
            "sae_lens_version": LAYOUT_VERSION,
        },
    }


def _origin_of_sae_lens(written: dict[str, Any]) -> dict[str, object]:
    metadata = written.get("metadata") or {}
    kept = ("hook_name", "model_name", "context_size", "prepend_bos")
    found = {name: metadata[name] for name in kept if metadata.get(name) is not None}
    return {**found, "expansion_factor": written["d_sae"] / written["d_in"]}


def _shared_keys(kind: type[Dictionary], written: dict[str, Any]) -> dict[str, object]:
    """The entries of SAELens's config that this kind's own config has under the same name."""
    names = {field.name for field in fields(kind.config_type)}
    return {name: value for name, value in written.items() if name in names}


def _mapping(value: object, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, found {type(value).__name__}.")
    return value


def _build(owner: type[Any], values: dict[str, Any], folder: Path) -> Any:
    unknown = set(values) - {field.name for field in fields(owner)}
    if unknown:
        raise ValueError(
            f"{folder / 'saefeat.json'} has the unknown key {sorted(unknown)[0]!r} for "
            f"{owner.__name__}. It was written by another version of saefeat."
        )
    # JSON has lists alone; the configs, which are frozen, have tuples.
    return owner(
        **{key: tuple(one) if isinstance(one, list) else one for key, one in values.items()}
    )


def _fill(dictionary: Dictionary, tensors: dict[str, Tensor], folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    wanted = {name: list(tensor.shape) for name, tensor in dictionary.file_tensors().items()}
    if set(tensors) != set(wanted):
        raise ValueError(
            f"{path} holds {sorted(tensors)}; a dictionary of kind {dictionary.architecture!r} "
            f"has {sorted(wanted)}."
        )
    for name, shape in wanted.items():
        if list(tensors[name].shape) != shape:
            raise ValueError(
                f"{name} in {path} has shape {list(tensors[name].shape)}, but d_in and d_sae in "
                f"cfg.json say {shape}."
            )
    dictionary.fill(tensors)
