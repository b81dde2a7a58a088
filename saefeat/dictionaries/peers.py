"""Files of dictionaries as other libraries write them; they are read, never written."""

import math
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from saefeat.core.files import read_json, read_tensors
from saefeat.dictionaries.found import Found


def find_gemma_scope(folder: Path) -> Found:
    """A folder of Gemma Scope (Lieberum et al. 2024, arXiv:2408.05147): `params.npz`, JumpReLU.

    The file does not say which hook it reads; set it by `with_origin(hook_name=...)`.
    """
    path = folder / "params.npz"
    try:
        with path.open("rb") as file:
            _check_sizes(file)
            with np.load(file, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole npz file ({error}).") from error
    # Files of some sizes name matrices w_enc and w_dec.
    tensors = {name.replace("w_", "W_"): tensor for name, tensor in tensors.items()}
    return Found(path=path, architecture="jumprelu", tensors=tensors, takes_b_dec_from_input=False)


def _check_sizes(file: IO[bytes]) -> None:
    """Refuse arrays whose header asks for more memory than there is data."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            with archive.open(member) as array:
                version = np.lib.format.read_magic(array)
                one = version == (1, 0)
                formats = np.lib.format
                read = formats.read_array_header_1_0 if one else formats.read_array_header_2_0
                shape, _, dtype = read(array)
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{member.filename} claims {list(shape)} and holds less")
    file.seek(0)


_LINEAR = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
_DICTIONARY_LEARNING = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
    "JumpReluAutoEncoder": "jumprelu",
}


def find_dictionary_learning(folder: Path) -> Found:
    """A folder of dictionary_learning: `ae.pt` with weights, `config.json` with the class.

    The one pickle that this library opens, by `torch.load(weights_only=True)`, which builds
    tensors and refuses everything else.
    """
    path = folder / "ae.pt"
    written: Any = read_json(folder / "config.json")
    trainer = written.get("trainer") if isinstance(written, dict) else None
    trainer = trainer if isinstance(trainer, dict) else {}
    name = str(trainer.get("dict_class"))
    if name not in _DICTIONARY_LEARNING:
        raise ValueError(
            f"{folder / 'config.json'} names the class {name!r}; of dictionary_learning's, this "
            f"library knows {', '.join(_DICTIONARY_LEARNING)}."
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a file of tensors alone ({reason}).") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not weights by name.")
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for key, tensor in loaded.items():
        if key == "k":
            config["k"] = int(tensor)
        elif key != "group_sizes":
            tensors[_LINEAR.get(str(key), str(key))] = (
                tensor.T if key.endswith(".weight") else tensor
            )
    if name == "AutoEncoderTopK":
        tensors.pop("threshold", None)  # only an option of its encode, off by default
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        threshold = tensors.get("threshold", torch.tensor(0.0))
        # -1 where it was never set; what passes a threshold below 0 stops at its ReLU.
        tensors["threshold"] = threshold.clamp_min(0).expand(len(tensors["b_enc"]))
    if "group_sizes" in loaded:
        sizes = loaded["group_sizes"].double()
        config["prefix_fractions"] = tuple((sizes.cumsum(0) / sizes.sum()).tolist())
        config["prefix_weights"] = (1.0,) * len(sizes)
    return Found(
        path=path,
        architecture=_DICTIONARY_LEARNING[name],
        tensors=tensors,
        config=config,
        origin=_dictionary_learning_origin(trainer),
        takes_b_dec_from_input=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
    )


def _dictionary_learning_origin(trainer: dict[str, Any]) -> dict[str, Any]:
    names = {"lm_name": "model_name", "submodule_name": "hook_name", "seed": "seed"}
    return {own: trainer[name] for name, own in names.items() if trainer.get(name) is not None}


def find_sparsify(folder: Path) -> Found:
    """A folder of sparsify (`eai-sparsify`): `sae.safetensors` and `cfg.json`, TopK."""
    path = folder / "sae.safetensors"
    config = read_json(folder / "cfg.json")
    if not isinstance(config, dict) or "d_in" not in config or "k" not in config:
        raise ValueError(f"{folder / 'cfg.json'} lacks d_in or k; sparsify writes both.")
    for key, plain in (("activation", "topk"), ("signed", False), ("skip_connection", False)):
        if config.get(key, plain) != plain:
            raise ValueError(
                f"{folder / 'cfg.json'} asks for {key}={config[key]!r}; this library has only "
                f"{plain!r}."
            )
    tensors = read_tensors(path)
    named = {_LINEAR.get(name, name): tensor for name, tensor in tensors.items()}
    if "encoder.weight" in tensors:
        named["W_enc"] = tensors["encoder.weight"].T
    return Found(
        path=path,
        architecture="topk",
        tensors=named,
        config={"k": config["k"]},
        origin={"hook_name": folder.name},
        d_in=config["d_in"],
        is_transcoder=bool(config.get("transcode", False)),
    )
