"""Files of dictionaries, in the layout of SAELens.

A folder holds `cfg.json` and `sae_weights.safetensors`, which `sae_lens.SAE.load_from_disk` opens
as its own, and `saefeat.json` with what SAELens has no field for.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from saefeat.core.files import (
    claim_folder,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from saefeat.core.records import entry, mapping
from saefeat.core.shared_file import allocate_tensors, write_blocks
from saefeat.dictionaries.base import Dictionary
from saefeat.dictionaries.found import Found

WEIGHTS = "sae_weights.safetensors"

LAYOUT_VERSION = "6.54.12"
"""The SAELens release whose layout is written, and that the tests open it with."""

_TRANSCODERS = {"transcoder": "standard", "jumprelu_transcoder": "jumprelu"}
SAE_LENS_ARCHITECTURES = {
    **{kind: kind for kind in ("standard", "topk", "jumprelu", "gated")},
    **_TRANSCODERS,
}
"""Architectures of SAELens that this library has, and what it calls them."""

_METADATA = {
    "hook_name": "hook_name",
    "hook_name_out": "target_hook_name",
    "model_name": "model_name",
    "context_size": "context_size",
    "prepend_bos": "prepend_bos",
}
"""SAELens's names of what `Origin` holds."""

_KNOWN = {
    *("architecture", "d_in", "d_sae", "d_out", "dtype", "device", "metadata"),
    *("apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
    *("k", "rescale_acts_by_decoder_norm"),
}
"""Keys of SAELens 6. Before, settings of the training stood at the same level."""


def save(dictionary: Dictionary, folder: Path) -> Path:
    """Write `dictionary` into a new or empty folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder already holds files.
        ValueError: A weight is not finite.
    """
    _check_finite(dictionary)
    claim_folder(folder, what="dictionary")
    write_tensors(folder / WEIGHTS, dictionary.file_tensors())
    _write_facts(dictionary, folder)
    return folder


def prepare(whole: Dictionary, folder: Path) -> None:
    """Make the folder of a dictionary whose latents several processes have, for `save_latents`.

    Args:
        whole: The dictionary, with its origin; its weights may be on the meta device.
        folder: See `save`.
    """
    claim_folder(folder, what="dictionary")
    allocate_tensors(folder / WEIGHTS, whole.file_tensors())
    _write_facts(whole, folder)


def save_latents(shard: Dictionary, whole: Dictionary, folder: Path, first: int) -> None:
    """Write some latents of a dictionary into the folder that `prepare` made; see `save`.

    Args:
        shard: A dictionary of these latents alone.
        whole: What `prepare` was given.
        folder: The folder.
        first: Number of the first of them. What belongs to no latent is written with latent 0.
    """
    _check_finite(shard)
    outline = whole.file_tensors()
    blocks = {
        name: block
        for name, block in shard.file_tensors().items()
        if first == 0 or block.shape != outline[name].shape
    }
    write_blocks(folder / WEIGHTS, outline, blocks, first)


def _check_finite(dictionary: Dictionary) -> None:
    for name, tensor in dictionary.file_tensors().items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} of the dictionary of {dictionary.hook_name!r} holds NaN or infinity, so "
                "it is not saved. Its training diverged: lower the learning rate."
            )


def _write_facts(dictionary: Dictionary, folder: Path) -> None:
    write_json(
        folder / "saefeat.json",
        {
            "architecture": dictionary.architecture,
            "config": asdict(dictionary.config),
            "origin": asdict(dictionary.origin),
        },
    )
    # Last, so that a folder with a cfg.json is a whole one.
    write_json(folder / "cfg.json", _config(dictionary))


def find(folder: Path) -> Found:
    """What is in a folder that `save` or SAELens (5 or 6) wrote.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or asks for what this library cannot do.
    """
    path = folder / "cfg.json"
    written = mapping(read_json(path), path)
    d_in, d_sae = (entry(written, key, int, path) for key in ("d_in", "d_sae"))
    found = Found(
        path=folder,
        architecture="",
        tensors=read_tensors(folder / WEIGHTS),
        d_in=d_in,
        d_sae=d_sae,
        is_transcoder=written.get("d_out") is not None,
    )
    if (folder / "saefeat.json").is_file():
        path = folder / "saefeat.json"
        own = mapping(read_json(path), path)
        found.architecture = entry(own, "architecture", str, path)
        found.config = entry(own, "config", dict[str, Any], path)
        found.origin = entry(own, "origin", dict[str, Any], path)
        return found
    return _translated(found, written)


def from_pretrained(release: str, sae_id: str) -> Found:
    """A dictionary of SAELens's registry, or of a repository on the hub that SAELens wrote.

    SAELens downloads it and translates its format, among them Gemma Scope's and Llama Scope's.

    Raises:
        ModuleNotFoundError: SAELens is not installed.
        ValueError: There is no such release or id, or it is of a kind not known here.
    """
    try:
        from sae_lens import SAE
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Dictionaries of SAELens's registry are loaded through SAELens, which is not "
            "installed. Run: pip install 'saefeat[sae-lens]'"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        SAE.from_pretrained(release, sae_id).save_model(folder)
        found = find(Path(folder))
    found.path = Path(release) / sae_id
    return found


def _config(dictionary: Dictionary) -> dict[str, object]:
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
            "hook_name_out": origin.target_hook_name,
            "hook_head_index": None,
            "context_size": origin.context_size,
            "prepend_bos": origin.prepend_bos,
            "seqpos_slice": [None],
            "dataset_path": None,
            "sae_lens_version": LAYOUT_VERSION,
        },
    }


def _translated(found: Found, written: dict[str, Any]) -> Found:
    """`found` completed from a config that SAELens wrote."""
    path = found.path / "cfg.json"
    is_old = "metadata" not in written
    unknown = set(written) - _KNOWN
    if unknown and not is_old:
        raise ValueError(f"{path} has the unknown key {sorted(unknown)[0]!r}.")
    metadata = written if is_old else mapping(written["metadata"], f"metadata in {path}")
    architecture = entry(written, "architecture", str, path, "standard")
    options = entry(written, "activation_fn_kwargs", dict[str, Any] | None, path, None) or {}
    activation = written.get("activation_fn_str", written.get("activation_fn", "relu"))
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    elif activation not in ("relu", "topk"):
        raise ValueError(f"{path} asks for the activation {activation!r}; known are relu, topk.")
    if architecture not in SAE_LENS_ARCHITECTURES:
        raise ValueError(
            f"{path} names the architecture {architecture!r}; of SAELens's, this library knows "
            f"{', '.join(SAE_LENS_ARCHITECTURES)}."
        )
    if written.get("normalize_activations") not in (None, False, "none"):
        raise ValueError(
            f"{path} asks for normalize_activations={written['normalize_activations']!r}, which "
            "is not folded into the weights. In SAELens, fold it before saving "
            "(fold_activation_norm_scaling_factor)."
        )
    found.architecture = SAE_LENS_ARCHITECTURES[architecture]
    found.is_transcoder = architecture in _TRANSCODERS
    found.takes_b_dec_from_input = entry(written, "apply_b_dec_to_input", bool, path, True)
    if found.is_transcoder and found.takes_b_dec_from_input:
        raise ValueError(f"{path} is a transcoder with apply_b_dec_to_input, which is not known.")
    if architecture == "topk":
        found.config["k"] = written.get("k", options.get("k"))
        found.ranks_by_decoder_norm = entry(
            written, "rescale_acts_by_decoder_norm", bool, path, False
        )
    if not (found.tensors.pop("scaling_factor", torch.ones(1)) == 1).all():
        raise ValueError(f"{found.path} has a scaling_factor other than 1, from fine-tuning.")
    found.origin = {
        own: metadata[name] for name, own in _METADATA.items() if metadata.get(name) is not None
    }
    if metadata.get("hook_point") is not None:
        found.origin["hook_name"] = metadata["hook_point"]
    if found.d_in and found.d_sae:  # `build` says what is wrong with 0
        found.origin["expansion_factor"] = found.d_sae / found.d_in
    return found
