"""Opens a store for reading: index, rows to train on, held-out rows and their text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saefeat.activations.hook_names import matching_hooks
from saefeat.activations.sources import Chunk
from saefeat.activations.store_index import (
    HELD_OUT,
    TRAIN,
    StoreIndex,
    check_files,
    read_index,
)
from saefeat.activations.store_source import StoreSource
from saefeat.activations.stream_checks import rows_to_mix
from saefeat.activations.tokens import Tokens
from saefeat.core.files import hash_bytes
from saefeat.core.folders import Folder, LocalFolder, RemoteFolder, open_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenStore:
    """What a stream needs of a store."""

    index: StoreIndex
    train: StoreSource
    held_out: StoreSource | None
    tokens: Tokens | None
    """The held-out contexts, all marked as held out; None if the store has none."""
    example: Chunk
    """One row of each hook, for its width and dtype."""


def open_store_sources(
    place: str | Path,
    hooks: str | Sequence[str] | None,
    *,
    batch_size: int,
    buffer_rows: int | None,
    storage_options: Mapping[str, Any] | None = None,
) -> OpenStore:
    """Opens a store for `ActivationStream.from_store`, which says what the arguments mean."""
    folder = open_folder(place, storage_options)
    index = read_index(folder)
    check_files(folder, index)
    if index.n_rows(TRAIN) == 0:
        raise ValueError(
            f"{folder} holds no training rows yet. Was its writer interrupted? Go on with "
            "cache_activations(..., resume=True)."
        )
    window_rows = buffer_rows
    if buffer_rows is None and not all(run.is_shuffled for run in index.runs):
        window_rows = rows_to_mix(batch_size, None)
    chosen = index.hooks if hooks is None else matching_hooks(index.hooks, hooks, owner="store")
    train, held_out = (
        StoreSource(
            folder,
            index,
            [shard for shard in index.shards if shard.split == split],
            chosen,
            chunk_rows=batch_size,
            window_rows=window_rows,
        )
        for split in (TRAIN, HELD_OUT)
    )
    dtype = torch.float32 if index.dtype == "int8" else getattr(torch, index.dtype)
    return OpenStore(
        index=index,
        train=train,
        held_out=held_out if held_out.n_rows else None,
        tokens=_held_out_tokens(folder, index),
        example={hook: torch.zeros(1, index.widths[hook], dtype=dtype) for hook in chosen},
    )


def first_rows(
    folder: LocalFolder | RemoteFolder, index: StoreIndex, split: str, run: int
) -> Chunk | None:
    """The first rows that a run stored, a block of them, as they were encoded."""
    shards = [one for one in index.shards if (one.split, one.run) == (split, run)][:1]
    if not shards:
        return None
    check_files(folder, index)
    source = StoreSource(folder, index, shards, index.hooks, chunk_rows=1, window_rows=None)
    return source.stored(0)


def _held_out_tokens(folder: Folder, index: StoreIndex) -> Tokens | None:
    from safetensors.torch import load

    parts = []
    for one in index.held_out_contexts:
        data = folder.read(one.file)
        if hash_bytes(data) != one.blake2b:
            raise ValueError(f"{folder}/{one.file} is damaged: its hash differs from the index.")
        part = load(data)
        shapes = {name: one.shape for name, one in part.items() if name != "text_hashes"}
        if not {"ids", "counts"} <= shapes.keys() or len(set(shapes.values())) > 1:
            raise ValueError(f"{folder}/{one.file} does not hold contexts; it is damaged.")
        parts.append(part)
    if not parts:
        return None
    has_mask = any("attention_mask" in part for part in parts)
    masks = [part.get("attention_mask", torch.ones_like(part["counts"])) for part in parts]
    ids = torch.cat([part["ids"] for part in parts]).long()
    has_text = all({"ends", "text_hashes"} <= part.keys() for part in parts)
    return Tokens(
        ids=ids,
        counts=torch.cat([part["counts"] for part in parts]),
        attention_mask=torch.cat(masks) if has_mask else None,
        n_held_out=len(ids),
        prepend_bos=bool(index.prepend_bos),
        tokenizer_name=index.tokenizer_name,
        ends=torch.cat([part["ends"] for part in parts]) if has_text else None,
        text_hashes=torch.cat([part["text_hashes"] for part in parts]) if has_text else None,
    )
