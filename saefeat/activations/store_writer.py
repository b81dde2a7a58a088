"""Puts rows into shards; a shard is in the store once the index names it.

Shape letters: n rows, d width of a hook.
"""

import errno
import re
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from saefeat.activations.quantise import quantise
from saefeat.activations.sources import POSITIONS, TOKEN_IDS, Chunk
from saefeat.activations.store_index import (
    HELD_OUT,
    INDEX_NAME,
    SCALES,
    TRAIN,
    StoredFile,
    StoreIndex,
    encode_index,
)
from saefeat.activations.tokens import Tokens
from saefeat.core.files import hash_bytes
from saefeat.core.folders import LocalFolder, RemoteFolder
from saefeat.core.locks import WriterLock

_LEFTOVER = re.compile(
    r"(shard-\d+|held-out-contexts-\d+)\.safetensors"
    r"|\.(shard-\d+\.safetensors|held-out-contexts-\d+\.safetensors|index\.json)\.[0-9a-f]{32}"
)
"""Files of this writer: whole ones that no index names yet, and unfinished ones."""


class StoreWriter:
    """Collects rows, and adds them to the store a shard at a time.

    Holds one shard in memory, three while it is written (rows, the file, and what safetensors
    makes of it).
    """

    def __init__(
        self,
        folder: LocalFolder | RemoteFolder,
        index: StoreIndex,
        lock: WriterLock,
        rows_per_shard: int,
    ) -> None:
        self.index = index
        self._folder = folder
        self._lock = lock
        self._rows_per_shard = rows_per_shard
        self._pieces: list[Chunk] = []
        self._n_waiting = 0
        self._n_safe_rows = index.n_rows(TRAIN)

    def publish(self) -> None:
        """Writes the index: what it names is safe from now on."""
        self._write(INDEX_NAME, encode_index(self.index))
        self._n_safe_rows = self.index.n_rows(TRAIN)

    def add(self, split: str, rows: Mapping[str, Tensor]) -> None:
        """Takes rows of one split, in the encoding of the store or to be encoded."""
        start, n_rows = 0, len(next(iter(rows.values())))
        while start < n_rows:
            stop = min(n_rows, start + self._rows_per_shard - self._n_waiting)
            part = {name: x[start:stop] for name, x in rows.items()}
            self._pieces.append(encode_rows(part, self.index))
            self._n_waiting += stop - start
            start = stop
            if self._n_waiting == self._rows_per_shard:
                self.flush(split)

    def flush(self, split: str) -> None:
        """Writes what waits as a shard, and names it in the index."""
        if self._n_waiting == 0:
            return
        tensors = {name: torch.cat([one[name] for one in self._pieces]) for name in self._pieces[0]}
        n_rows = self._n_waiting
        self._pieces, self._n_waiting = [], 0
        number = len(self.index.shards)
        self.index.shards.append(
            self._save(f"shard-{number:05d}.safetensors", tensors, n_rows, split)
        )
        self.publish()

    def save_contexts(self, tokens: Tokens) -> None:
        """Writes the contexts of this run's held-out rows; the next `publish` names them."""
        tensors = {"ids": tokens.ids.to(torch.int32), "counts": tokens.counts}
        optional = ("attention_mask", "ends", "text_hashes")
        found = {name: getattr(tokens, name) for name in optional}
        tensors |= {name: one for name, one in found.items() if one is not None}
        before = self.index.held_out_contexts
        # Never a name that the index vouches for: a kill might leave the one without the other.
        number = 1 + max((int(re.sub(r"\D", "", one.file)) for one in before), default=-1)
        name = f"held-out-contexts-{number:05d}.safetensors"
        saved = self._save(name, tensors, tokens.n_contexts, HELD_OUT)
        self.index.held_out_contexts = [*(one for one in before if one.run != saved.run), saved]

    def remove_leftovers(self) -> None:
        """Deletes what an interrupted writer left, which no index names."""
        named = {one.file for one in self.index.files}
        for name in self._folder.sizes():
            if name not in named and _LEFTOVER.fullmatch(name):
                self._folder.remove(name)

    def _save(
        self, name: str, tensors: Mapping[str, Tensor], n_rows: int, split: str
    ) -> StoredFile:
        whole = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        data = save(whole, {"format": "pt"})
        self._write(name, data)
        return StoredFile(
            file=name,
            n_rows=n_rows,
            n_bytes=len(data),
            blake2b=hash_bytes(data),
            split=split,
            run=len(self.index.runs) - 1,
        )

    def _write(self, name: str, data: bytes) -> None:
        self._lock.check()
        try:
            self._folder.write(name, data)
        except OSError as error:
            reason = error.strerror or str(error)
            advice = "Make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Mend that"
            raise OSError(
                error.errno or errno.EIO,
                f"{name} could not be written to {self._folder} ({reason}). "
                f"{self._n_safe_rows:,} training rows are safe there. {advice}, and go on with "
                "resume=True",
            ) from error


def is_only_leftovers(names: list[str]) -> bool:
    """Whether a folder without an index holds nothing but what a killed writer leaves."""
    return all(_LEFTOVER.fullmatch(name) for name in names)


def encode_rows(rows: Mapping[str, Tensor], index: StoreIndex) -> Chunk:
    """Rows as they lie in a shard: activations in the store's dtype, tokens as they are.

    Raises:
        ValueError: A value does not fit into the dtype.
    """
    encoded: Chunk = {}
    for hook in index.hooks:
        values = rows[hook].detach()
        if index.dtype == "int8":
            encoded[hook], encoded[SCALES + hook] = quantise(values)
            is_whole = bool(encoded[SCALES + hook].isfinite().all())
        else:
            # A copy of its own: the batch may be a view of something larger.
            encoded[hook] = values.to(getattr(torch, index.dtype), copy=True)
            # What is not converted was found finite by its source.
            is_whole = encoded[hook].dtype == values.dtype or bool(encoded[hook].isfinite().all())
        if not is_whole:
            raise ValueError(
                f"Activations of {hook} are beyond the range of {index.dtype}, or not finite. "
                'Store them as "bfloat16" or "float32".'
            )
    if index.has_tokens:
        encoded |= {name: rows[name].to(torch.int32) for name in (TOKEN_IDS, POSITIONS)}
    return encoded
