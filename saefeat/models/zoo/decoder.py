"""A decoder's weights at the start, and its folder as Hugging Face lays models out."""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.files import (
    publish_folder,
    read_json,
    read_tensors,
    temporary_folder,
    write_bytes,
    write_json,
    write_tensors,
)
from saefeat.models.zoo.network import named_views, parameter_sizes
from saefeat.models.zoo.shapes import Shape
from saefeat.models.zoo.tokenizer import BYTE_VOCABULARY, END_OF_TEXT, byte_tokenizer

EMBEDDING_DEVIATION = 0.2
"""Standard deviation of the embeddings at the start."""


def initial_weights(
    shape: Shape, *, seed: int, vocabulary_size: int = BYTE_VOCABULARY, context_size: int = 64
) -> Float[Tensor, " n"]:
    """All parameters at the start, in the order of `parameter_sizes`.

    Matrices of blocks are normal with deviation 1 / sqrt(rows), those that write to the stream
    sqrt(2 L) times less (Radford et al. 2019), the unembedding 1 / (2 sqrt(d)). GPT-2's own 0.02
    for everything is small for narrow models: after 1.5M bytes the loss is 0.1 nats higher.
    """
    sizes = parameter_sizes(shape, vocabulary_size, context_size)
    weights = torch.zeros(sum(math.prod(size) for size in sizes.values()))
    generator = torch.Generator().manual_seed(seed)
    for name, value in named_views(weights, sizes).items():
        if name.endswith(".bias"):
            continue
        if value.ndim == 1:
            value.fill_(1)
            continue
        deviation = len(value) ** -0.5
        if name.endswith("c_proj.weight"):
            deviation /= math.sqrt(2 * shape.n_layers)
        elif name == "lm_head.weight":
            deviation = 0.5 * shape.d_model**-0.5
        elif "transformer.w" in name:
            deviation = EMBEDDING_DEVIATION
        value.normal_(std=deviation, generator=generator)
    return weights


def write_model(
    folder: Path,
    shape: Shape,
    weights: Float[Tensor, " n"],
    *,
    tokenizer: str,
    context_size: int,
    record: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Put a model where transformers and `load_model` find it, with `zoo.json` beside it."""
    vocabulary = json.loads(tokenizer)["model"]["vocab"]
    added = {one["content"]: one["id"] for one in json.loads(tokenizer)["added_tokens"]}
    vocabulary_size = len(vocabulary | added)
    end = added[END_OF_TEXT]
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": shape.n_layers,
        "n_embd": shape.d_model,
        "n_head": shape.n_heads,
        "n_inner": shape.d_mlp,
        "n_positions": context_size,
        "vocab_size": vocabulary_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    sizes = parameter_sizes(shape, vocabulary_size, context_size)
    parameters = {name: one.to(dtype) for name, one in named_views(weights, sizes).items()}
    write_tensors(folder / "model.safetensors", parameters, {"format": "pt"})
    write_bytes(folder / "tokenizer.json", tokenizer.encode())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "model_max_length": context_size,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_json(folder / "config.json", config)
    write_json(folder / "zoo.json", record)


def read_weights(folder: Path) -> Float[Tensor, " n"]:
    """All parameters of a model's folder as float32, in the order of `parameter_sizes`."""
    config = read_json(folder / "config.json")
    shape = Shape(config["n_layer"], config["n_embd"], config["n_head"])
    sizes = parameter_sizes(shape, config["vocab_size"], config["n_positions"])
    parameters = read_tensors(folder / "model.safetensors")
    return torch.cat([parameters[name].float().flatten() for name in sizes])


def write_random_model(
    folder: Path, shape: Shape, seed: int = 0, *, context_size: int = 64
) -> None:
    """Put a byte-level model into a folder as it is before training: a control.

    Args:
        folder: Made by this call.
        seed: That of the weights, the same as a trained model with that seed began with.
    """
    with temporary_folder(folder) as draft:
        write_model(
            draft,
            shape,
            initial_weights(shape, seed=seed, context_size=context_size),
            tokenizer=byte_tokenizer().to_str(),
            context_size=context_size,
            record={"shape": [shape.n_layers, shape.d_model, shape.n_heads], "seed": seed},
        )
        publish_folder(draft, folder)


def random_model(shape: Shape, seed: int = 0, *, context_size: int = 64, **options: Any) -> Any:
    """What `write_random_model` writes, as a TransformerLens model.

    Args:
        options: `dtype` and `device`, as for `load_model`.
    """
    from saefeat.models.load import load_model

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / f"random-{shape.label}-seed{seed}"
        write_random_model(folder, shape, seed, context_size=context_size)
        return load_model(folder, **options)
