"""Whether a stream may be written to a folder: what is there, and whether the two fit."""

import torch

from saefeat.activations.sources import POSITIONS, TOKEN_IDS, Batch
from saefeat.activations.store_index import (
    DTYPES,
    INDEX_NAME,
    SCALES,
    StoredRun,
    StoreIndex,
    item_bytes,
    read_index,
)
from saefeat.activations.store_reader import first_rows
from saefeat.activations.store_writer import encode_rows, is_only_leftovers
from saefeat.activations.stream import ActivationStream
from saefeat.core.folders import LocalFolder, RemoteFolder
from saefeat.core.locks import LOCK_NAME

BLOCK_BYTES = {True: 2**20, False: 2**18}
"""Neighbouring rows of the widest hook that are read together, so that a disk seeks once for them:
of rows in random order, and of others, which need more blocks to mix."""

_ADVICE = "Resume with the same stream, or add this one with append=True."


def check_options(
    stream: ActivationStream,
    n_tokens: int | None,
    held_out_tokens: int | None,
    dtype: str | None,
    rows_per_shard: int | None,
    resume: bool,
    append: bool,
) -> None:
    """Refuse what `cache_activations` cannot do, before anything is read.

    Raises:
        ValueError: An option is out of range, unknown, or at odds with another or the stream.
    """
    for name, value, least in (
        ("n_tokens", n_tokens, 1),
        ("held_out_tokens", held_out_tokens, 0),
        ("rows_per_shard", rows_per_shard, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}={value} is too small; it must be at least {least}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} cannot be stored; use {', '.join(DTYPES)}.")
    if resume and append:
        raise ValueError(
            "resume=True goes on with the stream that was written last, and append=True adds "
            "another one. Set one of them."
        )
    if held_out_tokens and stream.n_held_out_rows == 0:
        raise ValueError(
            f"held_out_tokens={held_out_tokens}, but the stream holds nothing out. Make it with "
            "a held-out share, or store without."
        )
    reserved = [
        hook
        for hook in stream.hooks
        if hook in (TOKEN_IDS, POSITIONS, "__metadata__") or hook.startswith(SCALES)
    ]
    if reserved:
        raise ValueError(f"A hook must not be called {reserved[0]!r}: a shard needs the name.")


def new_index(stream: ActivationStream, dtype: str | None, shuffle: bool) -> StoreIndex:
    """The index of a store of this stream that has no rows yet.

    Raises:
        ValueError: No dtype is asked for, and the stream has several, or one that is not stored.
    """
    if dtype is None:
        dtypes = {str(one).removeprefix("torch.") for one in stream.dtypes.values()}
        if len(dtypes) > 1 or not dtypes <= set(DTYPES):
            raise ValueError(
                f"The stream gives {', '.join(sorted(dtypes))}, and a store has one dtype of "
                f'{", ".join(DTYPES)}. Choose it: dtype="float32".'
            )
        dtype = dtypes.pop()
    tokens = stream.held_out_tokens
    widest = max(stream.widths.values()) * item_bytes(dtype)
    return StoreIndex(
        model=stream.model_name,
        hooks=list(stream.hooks),
        widths=dict(stream.widths),
        dtype=dtype,
        has_tokens=stream.has_tokens,
        context_size=stream.context_size,
        prepend_bos=stream.prepend_bos,
        tokenizer_name=tokens.tokenizer_name if tokens else "",
        block_rows=max(1, BLOCK_BYTES[shuffle] // widest),
    )


def existing_index(place: LocalFolder | RemoteFolder, is_welcome: bool) -> StoreIndex | None:
    """The index that is there; None if there is none and the folder may be taken.

    Raises:
        FileExistsError: There are files, and the store is not `is_welcome`, or they are no store.
        ValueError: The index is damaged, or of another version.
    """
    names = [name for name in place.sizes() if name != LOCK_NAME]
    if names and not is_welcome:
        raise FileExistsError(
            f"{place} already holds files, and a store never overwrites anything. Choose another "
            "folder, or set resume=True to go on with it, append=True to add to it."
        )
    if INDEX_NAME in names:
        return read_index(place)
    if not is_only_leftovers(names):
        raise FileExistsError(
            f"{place} holds files but no {INDEX_NAME}, so it is no store. Choose another folder."
        )
    return None


def check_same_kind(place: LocalFolder | RemoteFolder, index: StoreIndex, new: StoreIndex) -> None:
    """That a store can hold rows of a stream, whose own index would be `new`.

    Raises:
        ValueError: Model, hooks, widths, dtype or contexts are others.
    """
    for name in ("model", "hooks", "widths", "dtype", "has_tokens", "context_size", "prepend_bos"):
        there, here = getattr(index, name), getattr(new, name)
        if there != here:
            raise ValueError(
                f"{place} holds activations with {name} {there!r}, and this stream has {here!r}. "
                "A store holds one kind; choose another folder."
            )


def check_same_stream(place: LocalFolder | RemoteFolder, index: StoreIndex, run: StoredRun) -> None:
    """That the stream is the one of the last run, as far as its numbers tell.

    Raises:
        ValueError: A number is another.
    """
    differences = index.runs[-1].differences(run)
    if differences:
        raise ValueError(
            f"{place} was begun with another stream ({'; '.join(differences)}). {_ADVICE}"
        )


def check_first_rows(
    place: LocalFolder | RemoteFolder, index: StoreIndex, split: str, batch: Batch
) -> None:
    """That the rows of a split that the last run stored first are those that are drawn again.

    Raises:
        ValueError: They are others, by more than rounding explains.
    """
    stored = first_rows(place, index, split, run=len(index.runs) - 1)
    if stored is None:
        return
    drawn = encode_rows(batch, index)
    for name, values in stored.items():
        again = drawn[name][: len(values)].float()
        before = values[: len(again)].float()
        # Other threads or another processor may round the last bits in another way.
        tolerance = 0.02 * float(before.abs().max())
        if not torch.allclose(again.cpu(), before, rtol=0.02, atol=tolerance):
            raise ValueError(
                f"{place} was begun with another stream: its first rows of {name} are others. "
                f"{_ADVICE}"
            )
