"""The tensors of shards: mapped into memory where they lie here, fetched by block where not."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from saefeat.activations.store_index import StoredFile, StoreIndex
from saefeat.core.files import TensorPlace, read_tensor_places
from saefeat.core.folders import Folder, LocalFolder

Numbers = npt.NDArray[np.int64]
TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "I32": torch.int32,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Blocks:
    """Which rows each block has."""

    shard: Numbers
    """The shard that it lies in."""
    start: Numbers
    """Its first row there."""
    size: Numbers
    """How many rows it has."""


class Shards(ABC):
    """Shards of a store, the header of each checked before its first use.

    A *piece* is what a tensor of rows can be had of at once; `piece` and `offset` say of each
    block which piece it lies in, and from which row on.
    """

    piece: Numbers
    offset: Numbers

    def __init__(
        self,
        folder: Folder,
        index: StoreIndex,
        shards: Sequence[StoredFile],
        columns: Sequence[str],
        blocks: Blocks,
    ) -> None:
        """`columns` are those tensors of a shard that are read."""
        self._folder = folder
        self._index = index
        self._shards = shards
        self._columns = columns
        self._blocks = blocks
        self._places: dict[int, dict[str, TensorPlace]] = {}

    @abstractmethod
    def prepare(self, blocks: Numbers, ahead: Numbers) -> None:
        """Says which blocks are read now, and which are likely to be next."""

    @abstractmethod
    def column(self, piece: int, name: str) -> Tensor:
        """A tensor of the piece: rows of a hook, their scales, token ids or positions."""

    def places(self, shard: int) -> dict[str, TensorPlace]:
        """Where the tensors of a shard lie."""
        if shard not in self._places:
            self._places[shard] = self._checked(self._shards[shard])
        return self._places[shard]

    def _spans(self, blocks: Numbers) -> dict[int, list[tuple[int, str, int, int]]]:
        """By shard: block, column, and first and last byte of the one in the other."""
        spans: dict[int, list[tuple[int, str, int, int]]] = {}
        for block in blocks.tolist():
            shard = int(self._blocks.shard[block])
            first, size = int(self._blocks.start[block]), int(self._blocks.size[block])
            for column in self._columns:
                place = self.places(shard)[column]
                row_bytes = (place.stop - place.start) // place.shape[0]
                start = place.start + first * row_bytes
                span = (block, column, start, start + size * row_bytes)
                spans.setdefault(shard, []).append(span)
        return spans

    def _checked(self, shard: StoredFile) -> dict[str, TensorPlace]:
        name = f"{self._folder}/{shard.file}"

        def read(start: int, stop: int) -> bytes:
            return self._folder.read_ranges(shard.file, [(start, stop)])[0]

        places = read_tensor_places(read, shard.n_bytes, name)
        expected = self._index.columns(shard.n_rows)
        found = {key: (place.dtype, place.shape) for key, place in places.items()}
        if found != expected:
            wrong = next(key for key in [*expected, *found] if found.get(key) != expected.get(key))
            raise ValueError(
                f"{name} holds {found.get(wrong, 'nothing')} as {wrong!r}, where the index "
                f"promises {expected.get(wrong, 'nothing')}; it is damaged, or of another store."
            )
        return places


class MappedShards(Shards):
    """Shards of this machine; a piece is a shard, and its tensors are views of the file."""

    def __init__(
        self,
        folder: LocalFolder,
        index: StoreIndex,
        shards: Sequence[StoredFile],
        columns: Sequence[str],
        blocks: Blocks,
    ) -> None:
        super().__init__(folder, index, shards, columns, blocks)
        self.piece, self.offset = blocks.shard, blocks.start
        self._path = folder.path
        self._tensors: dict[int, dict[str, Tensor]] = {}

    def prepare(self, blocks: Numbers, ahead: Numbers) -> None:
        # Only a hint: the kernel begins to read what comes next, if it is not in memory yet.
        if not hasattr(os, "posix_fadvise") or self._is_cached(ahead):
            return
        for shard, spans in self._spans(ahead).items():
            file = self._open(shard)
            try:
                for _, _, start, stop in spans:
                    os.posix_fadvise(file, start, stop - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    def _is_cached(self, blocks: Numbers) -> bool:
        """Whether the page cache holds some blocks, judged by the last, which it would get last."""
        if len(blocks) == 0 or not hasattr(os, "RWF_NOWAIT"):
            return len(blocks) == 0
        for shard, spans in self._spans(blocks[-1:]).items():
            file = self._open(shard)
            try:
                return os.preadv(file, [bytearray(1)], spans[0][3] - 1, os.RWF_NOWAIT) == 1
            except OSError:
                return False
            finally:
                os.close(file)
        return False

    def _open(self, shard: int) -> int:
        return os.open(self._path / self._shards[shard].file, os.O_RDONLY)

    def column(self, piece: int, name: str) -> Tensor:
        tensors = self._tensors.setdefault(piece, {})
        if name not in tensors:
            self.places(piece)
            with safe_open(self._path / self._shards[piece].file, framework="pt") as file:
                tensors[name] = file.get_tensor(name)
        return tensors[name]


class FetchedBlocks(Shards):
    """Shards at a URL; a piece is a block, and the blocks prepared last are held."""

    def __init__(
        self,
        folder: Folder,
        index: StoreIndex,
        shards: Sequence[StoredFile],
        columns: Sequence[str],
        blocks: Blocks,
    ) -> None:
        super().__init__(folder, index, shards, columns, blocks)
        self.piece = np.arange(len(blocks.shard))
        self.offset = np.zeros(len(blocks.shard), dtype=np.int64)
        self._held: dict[tuple[int, str], Tensor] = {}

    def prepare(self, blocks: Numbers, ahead: Numbers) -> None:
        wanted = set(blocks.tolist())
        self._held = {key: x for key, x in self._held.items() if key[0] in wanted}
        missing = wanted - {block for block, _ in self._held}
        for shard, spans in self._spans(np.array(sorted(missing), dtype=np.int64)).items():
            name = self._shards[shard].file
            found = self._folder.read_ranges(name, [(start, stop) for *_, start, stop in spans])
            for (block, column, _, _), data in zip(spans, found, strict=True):
                place = self.places(shard)[column]
                # frombuffer wants memory that can be written.
                values = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[place.dtype])
                self._held[block, column] = values.view(-1, *place.shape[1:])

    def column(self, piece: int, name: str) -> Tensor:
        return self._held[piece, name]
