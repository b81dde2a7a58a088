"""What `index.json` says of a store: the one file that decides which rows are in it."""

import json
import re
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

from saefeat.activations.sources import POSITIONS, TOKEN_IDS
from saefeat.core.files import LARGEST_JSON, hash_bytes, parse_json
from saefeat.core.folders import Folder
from saefeat.core.records import from_json

INDEX_NAME = "index.json"
FORMAT = "saefeat activation store"
FORMAT_VERSION = 1
TRAIN, HELD_OUT = "train", "held_out"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
"""What rows can be stored as, and what safetensors calls it."""

SCALES = "scales/"
"""Before a hook's name: its scales in an int8 shard, one for each row."""

_SHARD_NAME = re.compile(r"shard-\d{5,9}\.safetensors")
_CONTEXTS_NAME = re.compile(r"held-out-contexts-\d{5,9}\.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file whose content the index vouches for."""

    file: str
    """Its name in the folder."""
    n_rows: int
    """Rows of activations, or contexts of tokens."""
    n_bytes: int
    """Its size."""
    blake2b: str
    """Hash of the whole file, 32 bytes in hexadecimal."""
    split: str
    """`train`, or `held_out` for what training never sees."""
    run: int
    """The run that wrote it, numbered from 0."""


@dataclass(kw_only=True, slots=True)
class StoredRun:
    """One stream that was written, by one call and the calls that resumed it."""

    seed: int
    """Of the stream, as are the next four."""
    batch_size: int
    buffer_rows: int
    n_source_rows: int
    n_source_held_out_rows: int
    is_shuffled: bool
    """Whether training rows were stored in the stream's random order, or in that of its source."""
    n_tokens: int | None = None
    """Training rows asked for; None for all."""
    is_complete: bool = False
    """Whether all rows that were asked for, or that there are, are in."""
    left_out: dict[str, Any] = field(default_factory=dict)
    """What the stream counted as left out, by split, once the split was complete."""

    def differences(self, other: "StoredRun") -> list[str]:
        """How the stream of `other` differs from that of this run."""
        names = ("seed", "batch_size", "buffer_rows", "n_source_rows", "n_source_held_out_rows")
        return [
            f"{name} {getattr(self, name)} then, {getattr(other, name)} now"
            for name in (*names, "is_shuffled")
            if getattr(self, name) != getattr(other, name)
        ]


@dataclass(kw_only=True, slots=True)
class StoreIndex:
    """The store as a whole."""

    model: str | None
    """The language model; None for activations that came without one."""
    hooks: list[str]
    """Hook names, in the order of the stream."""
    widths: dict[str, int]
    """Width of each."""
    dtype: str
    """A key of `DTYPES`."""
    has_tokens: bool
    """Whether each row has its `token_ids` and `positions`."""
    context_size: int | None
    """Positions in a context."""
    prepend_bos: bool | None
    """Whether contexts begin with BOS."""
    tokenizer_name: str
    """What the tokenizer calls itself."""
    block_rows: int
    """Rows that are read as neighbours."""
    runs: list[StoredRun] = field(default_factory=list)
    """What was written, in order."""
    shards: list[StoredFile] = field(default_factory=list)
    """The rows, in order."""
    held_out_contexts: list[StoredFile] = field(default_factory=list)
    """The text that held-out rows are from."""
    libraries: dict[str, str] = field(default_factory=dict)
    """Versions of what wrote the store last."""

    def n_rows(self, split: str, run: int | None = None) -> int:
        """Rows of a split, of one run or of all."""
        return sum(
            shard.n_rows
            for shard in self.shards
            if shard.split == split and (run is None or shard.run == run)
        )

    @property
    def row_bytes(self) -> int:
        """Bytes that a row takes in a shard, all hooks together."""
        scales = 4 * len(self.hooks) if self.dtype == "int8" else 0
        return item_bytes(self.dtype) * sum(self.widths.values()) + scales + 8 * self.has_tokens

    def columns(self, n_rows: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of a shard: for each the dtype, as safetensors names it, and the shape."""
        columns: dict[str, tuple[str, tuple[int, ...]]] = {
            hook: (DTYPES[self.dtype], (n_rows, width)) for hook, width in self.widths.items()
        }
        if self.dtype == "int8":
            columns |= {SCALES + hook: ("F32", (n_rows,)) for hook in self.hooks}
        if self.has_tokens:
            columns |= dict.fromkeys((TOKEN_IDS, POSITIONS), ("I32", (n_rows,)))
        return columns

    @property
    def files(self) -> list[StoredFile]:
        """Everything that must be there."""
        return [*self.shards, *self.held_out_contexts]


def item_bytes(dtype: str) -> int:
    """Bytes of a number in a dtype of `DTYPES`."""
    return int(getattr(torch, dtype).itemsize)


def encode_index(index: StoreIndex) -> bytes:
    """The content of `index.json`."""
    others = {name: metadata.version(name) for name in ("safetensors", "fsspec", "numpy")}
    # torch's own word also says for which CUDA it was built, which its package may leave out.
    index.libraries = {"torch": str(torch.__version__), **others}
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "saefeat_version": metadata.version("saefeat"),
    }
    return (json.dumps(head | asdict(index), indent=1, allow_nan=False) + "\n").encode()


def read_index(folder: Folder) -> StoreIndex:
    """The index of a store, each field checked before it is trusted.

    Raises:
        FileNotFoundError: The folder holds no store.
        ValueError: The index is damaged, or of another version.
    """
    if folder.sizes().get(INDEX_NAME, 0) > LARGEST_JSON:
        raise ValueError(f"{folder}/{INDEX_NAME} is larger than any index; it is damaged.")
    try:
        data = folder.read(INDEX_NAME)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no store: it has no {INDEX_NAME}. cache_activations writes one."
        ) from None
    where = f"{folder}/{INDEX_NAME}"
    value = parse_json(data, where)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"{where} is not the index of an activation store.")
    if value.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {value.get('format_version')!r}, and this saefeat "
            f"({metadata.version('saefeat')}) reads version {FORMAT_VERSION}. It was written by "
            f"saefeat {value.get('saefeat_version')!r}: use that, or write the store anew."
        )
    for name in ("format", "format_version", "saefeat_version"):
        value.pop(name, None)
    index = from_json(StoreIndex, value, where)
    try:
        _check(index)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}.") from None
    return index


def _check(index: StoreIndex) -> None:
    """What types alone do not say.

    Raises:
        ValueError: Something does not hold; in words that `read_index` completes.
    """
    _require(bool(index.hooks) and list(index.widths) == index.hooks, "hooks are not the widths'")
    _require(len(set(index.hooks)) == len(index.hooks), "a hook is named twice")
    _require(all(width > 0 for width in index.widths.values()), "a width is not above 0")
    _require(index.dtype in DTYPES, f"dtype {index.dtype!r} is unknown")
    _require(index.block_rows > 0, "block_rows is not above 0")
    _require(len({one.file for one in index.files}) == len(index.files), "a file is named twice")
    for files, name in ((index.shards, _SHARD_NAME), (index.held_out_contexts, _CONTEXTS_NAME)):
        for one in files:
            # Also keeps the path within the folder: a name holds no separator.
            _require(bool(name.fullmatch(one.file)), f"{one.file!r} is no name of its files")
            _require(one.n_rows > 0 and one.n_bytes > 0, f"sizes of {one.file} are not above 0")
            _require(0 <= one.run < len(index.runs), f"the run of {one.file} is missing")
            _require(one.split in (TRAIN, HELD_OUT), f"{one.split!r} is no split")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def find_damage(folder: Folder, index: StoreIndex) -> dict[str, str]:
    """What is wrong with each file that the index names; empty if all are as they were written."""
    sizes = folder.sizes()
    damage = {}
    for one in index.files:
        if one.file not in sizes:
            damage[one.file] = "is missing"
        elif sizes[one.file] != one.n_bytes:
            damage[one.file] = f"has {sizes[one.file]} bytes and not {one.n_bytes}"
        elif hash_bytes(folder.read(one.file)) != one.blake2b:
            damage[one.file] = "does not hold what was written (its hash differs)"
    return damage


def check_files(folder: Folder, index: StoreIndex) -> None:
    """That every file is there and of its size, which costs no read.

    Raises:
        FileNotFoundError: One is missing.
        ValueError: One has another size.
    """
    sizes = folder.sizes()
    for one in index.files:
        if one.file not in sizes:
            raise FileNotFoundError(
                f"{folder}/{one.file} is missing, and {INDEX_NAME} names it. Put it back, or "
                "write the store anew."
            )
        if sizes[one.file] != one.n_bytes:
            raise ValueError(
                f"{folder}/{one.file} has {sizes[one.file]} bytes and not the {one.n_bytes} that "
                "were written; it is damaged or cut off."
            )
