"""Files of dictionaries as other libraries write them; they are read, never written."""

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.files import read_json, read_tensors
from saefeat.core.memory import available_host_bytes
from saefeat.core.records import entry, mapping, shortened
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
    # Whatever else a damaged archive makes zipfile and numpy raise (struct.error, zlib.error,
    # NotImplementedError, …), to the caller it is one thing.
    except Exception as error:
        # zipfile quotes names in full, of which a damaged length makes whole files.
        reason = shortened(str(error))
        raise ValueError(f"{path} is not a whole npz file ({reason}).") from error
    # Files of some sizes name matrices w_enc and w_dec.
    tensors = {name.replace("w_", "W_"): tensor for name, tensor in tensors.items()}
    return Found(path=path, architecture="jumprelu", tensors=tensors, takes_b_dec_from_input=False)


def _check_sizes(file: IO[bytes]) -> None:
    """Refuse arrays whose header asks for more memory than there is data."""
    with zipfile.ZipFile(file) as archive:
        unpacked, free = sum(one.file_size for one in archive.infolist()), available_host_bytes()
        if unpacked > free:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, and {free:,} are free")
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
    config_path = folder / "config.json"
    written = mapping(read_json(config_path), config_path)
    trainer = entry(written, "trainer", dict[str, Any], config_path)
    name = entry(trainer, "dict_class", str, config_path)
    if name not in _DICTIONARY_LEARNING:
        raise ValueError(
            f"{config_path} names the class {name!r}; of dictionary_learning's, this "
            f"library knows {', '.join(_DICTIONARY_LEARNING)}."
        )
    tensors = _read_pickled_tensors(path)
    config: dict[str, Any] = {}
    if "k" in tensors:
        config["k"] = int(_numbers(tensors.pop("k"), "k", path)[0])
    if "group_sizes" in tensors:
        sizes = _numbers(tensors.pop("group_sizes"), "group_sizes", path)
        config["prefix_fractions"] = (sizes.cumsum(0) / sizes.sum()).tolist()
        config["prefix_weights"] = [1.0] * len(sizes)
    tensors = _by_sae_lens_names(tensors)
    if name == "AutoEncoderTopK":
        tensors.pop("threshold", None)  # only an option of its encode, off by default
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE") and "b_enc" in tensors:
        threshold = _numbers(tensors.get("threshold", torch.tensor(0.0)), "threshold", path)
        # -1 where it was never set; what passes a threshold below 0 stops at its ReLU.
        tensors["threshold"] = threshold[:1].float().clamp_min(0).expand(tensors["b_enc"].numel())
    return Found(
        path=path,
        architecture=_DICTIONARY_LEARNING[name],
        tensors=tensors,
        config=config,
        origin=_dictionary_learning_origin(trainer),
        takes_b_dec_from_input=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
    )


def _read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `torch.save`; one that holds anything else is refused."""
    try:
        # Mapped, so that the file itself bounds what is read: of a packed or an old archive
        # torch would make room for whatever it claims to hold.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # A damaged pickle makes torch raise anything, from IndexError to struct.error.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a file of tensors alone ({reason}).") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not weights by name.")
    for name, one in loaded.items():
        # A view may repeat one number a billion times, and a tensor without memory claim any shape.
        is_plain = (
            isinstance(name, str)
            and isinstance(one, Tensor)
            and (one.layout, one.device.type, one.is_complex()) == (torch.strided, "cpu", False)
            and one.untyped_storage().nbytes() >= one.numel() * one.element_size()
        )
        if not is_plain:
            raise ValueError(f"{path} holds {name!r}, which is no tensor with numbers of its own.")
    return loaded


def _numbers(tensor: Tensor, name: str, path: Path) -> Float[Tensor, " n"]:
    """One finite number or more."""
    numbers = tensor.double().flatten()
    if len(numbers) == 0 or not numbers.isfinite().all():
        raise ValueError(f"{name} in {path} should be numbers, found {tensor.tolist()!r:.80}.")
    return numbers


def _by_sae_lens_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `nn.Linear` by the names and in the orientation of SAELens."""
    return {
        _LINEAR.get(name, name): one.transpose(0, -1)
        if name in ("encoder.weight", "decoder.weight")
        else one
        for name, one in tensors.items()
    }


def _dictionary_learning_origin(trainer: dict[str, Any]) -> dict[str, Any]:
    names = {"lm_name": "model_name", "submodule_name": "hook_name", "seed": "seed"}
    return {own: trainer[name] for name, own in names.items() if trainer.get(name) is not None}


def find_sparsify(folder: Path) -> Found:
    """A folder of sparsify (`eai-sparsify`): `sae.safetensors` and `cfg.json`, TopK."""
    path, config_path = folder / "sae.safetensors", folder / "cfg.json"
    config = mapping(read_json(config_path), config_path)
    for key, plain in (("activation", "topk"), ("signed", False), ("skip_connection", False)):
        if config.get(key, plain) != plain:
            raise ValueError(
                f"{config_path} asks for {key}={config[key]!r}; this library has only {plain!r}."
            )
    return Found(
        path=path,
        architecture="topk",
        tensors=_by_sae_lens_names(read_tensors(path)),
        config={"k": entry(config, "k", int, config_path)},
        origin={"hook_name": folder.name},
        d_in=entry(config, "d_in", int, config_path),
        is_transcoder=entry(config, "transcode", bool, config_path, False),
    )
