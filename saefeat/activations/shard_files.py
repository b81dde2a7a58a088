"""The tensors of shards: mapped into memory where they lie here, fetched by block where not."""

import os
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from saefeat.activations.store_index import DTYPES, StoredFile, StoreIndex
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


class Shards:
    """The shards of a store, each one's header checked before its first use.

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
        shard: Numbers,
        start: Numbers,
        size: Numbers,
    ) -> None:
        """The last three say of each block its shard, its first row there, and its rows."""
        self._folder = folder
        self._index = index
        self._shards = shards
        self._shard, self._start, self._size = shard, start, size
        self._places: dict[int, dict[str, TensorPlace]] = {}

    def prepare(self, blocks: Numbers, ahead: Numbers) -> None:
        """Says which blocks are read now, and which are likely to be next."""
        raise NotImplementedError

    def column(self, piece: int, name: str) -> Tensor:
        """A tensor of the piece: rows of a hook, their scales, token ids or positions."""
        raise NotImplementedError

    def places(self, shard: int) -> dict[str, TensorPlace]:
        """Where the tensors of a shard lie."""
        if shard not in self._places:
            self._places[shard] = self._checked(self._shards[shard])
        return self._places[shard]

    def _checked(self, shard: StoredFile) -> dict[str, TensorPlace]:
        name = f"{self._folder}/{shard.file}"

        def read(start: int, stop: int) -> bytes:
            return self._folder.read_ranges(shard.file, [(start, stop)])[0]

        places = read_tensor_places(read, shard.n_bytes, name)
        n, dtype = shard.n_rows, DTYPES[self._index.dtype]
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for hook, width in self._index.widths.items():
            expected[hook] = (dtype, (n, width))
            if dtype == "I8":
                expected[f"scales/{hook}"] = ("F32", (n,))
        if self._index.has_tokens:
            expected |= {key: ("I32", (n,)) for key in ("token_ids", "positions")}
        found = {key: (place.dtype, place.shape) for key, place in places.items()}
        if found != expected:
            wrong = next(
                key for key in [*expected, *found] if found.get(key) != expected.get(key)
            )
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
        shard: Numbers,
        start: Numbers,
        size: Numbers,
    ) -> None:
        super().__init__(folder, index, shards, shard, start, size)
        self.piece, self.offset = shard, start
        self._path = folder.path
        self._tensors: dict[int, dict[str, Tensor]] = {}

    def prepare(self, blocks: Numbers, ahead: Numbers) -> None:
        # Only a hint: the kernel starts to read what comes next, if it is not in memory yet.
        if not hasattr(os, "posix_fadvise"):
            return
        for shard in np.unique(self._shard[ahead]):
            of_shard = ahead[self._shard[ahead] == shard]
            file = os.open(self._path / self._shards[shard].file, os.O_RDONLY)
            try:
                for name in self._tensors.get(int(shard), {}):
                    place = self.places(int(shard))[name]
                    row_bytes = (place.stop - place.start) // place.shape[0]
                    for block in of_shard:
                        os.posix_fadvise(
                            file,
                            place.start + int(self._start[block]) * row_bytes,
                            int(self._size[block]) * row_bytes,
                            os.POSIX_FADV_WILLNEED,
                        )
            finally:
                os.close(file)

    def column(self, piece: int, name: str) -> Tensor:
        tensors = self._tensors.setdefault(piece, {})
        if name not in tensors:
            self.places(piece)
            with safe_open(self._path / self._shards[piece].file, framework="pt") as file:
                tensors[name] = file.get_tensor(name)
        return tensors[name]


class FetchedBlocks(Shards):
    """Shards at a URL; a piece is a block, and the blocks of one window are held."""

    def __init__(
        self,
        folder: Folder,
        index: StoreIndex,
        shards: Sequence[StoredFile],
        shard: Numbers,
        start: Numbers,
        size: Numbers,
    ) -> None:
        super().__init__(folder, index, shards, shard, start, size)
        self.piece = np.arange(len(shard))
        self.offset = np.zeros(len(shard), dtype=np.int64)
        self._lock = threading.Lock()
        self._held: dict[tuple[int, str], Tensor] = {}
        self._wanted: Numbers = self.piece[:0]

    def prepare(self, blocks: Numbers, ahead: Numbers) -> None:
        self._held = {}
        self._wanted = blocks

    def column(self, piece: int, name: str) -> Tensor:
        if (piece, name) not in self._held:
            self._fetch(name)
        return self._held[piece, name]

    def _fetch(self, name: str) -> None:
        """One column of all blocks of the window, with one request a shard."""
        for shard in np.unique(self._shard[self._wanted]):
            of_shard = self._wanted[self._shard[self._wanted] == shard]
            place = self.places(int(shard))[name]
            row_bytes = (place.stop - place.start) // place.shape[0]
            starts = [place.start + int(self._start[block]) * row_bytes for block in of_shard]
            ranges = [
                (first, first + int(self._size[block]) * row_bytes)
                for first, block in zip(starts, of_shard, strict=True)
            ]
            found = self._folder.read_ranges(self._shards[int(shard)].file, ranges)
            for block, data in zip(of_shard, found, strict=True):
                # frombuffer wants memory that can be written.
                values = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[place.dtype])
                self._held[int(block), name] = values.view(-1, *place.shape[1:])
