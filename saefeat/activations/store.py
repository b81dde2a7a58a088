"""Activations on disk: written once, read as often as dictionaries are trained on them."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saefeat.activations.sources import Batch
from saefeat.activations.store_claim import (
    check_first_rows,
    check_options,
    check_same_kind,
    check_same_stream,
    existing_index,
    new_index,
)
from saefeat.activations.store_index import (
    HELD_OUT,
    TRAIN,
    StoredRun,
    find_damage,
    read_index,
)
from saefeat.activations.store_writer import StoreWriter
from saefeat.activations.stream import ActivationStream
from saefeat.activations.tokens import Tokens
from saefeat.core.folders import LocalFolder, RemoteFolder, open_folder
from saefeat.core.locks import WriterLock
from saefeat.core.progress import progress_bar

SHARD_BYTES = 128 * 2**20
"""Size of a shard, unless told otherwise: three of them are the memory that writing takes."""


class ActivationStore:
    """A store as it lies on disk. `ActivationStream.from_store` reads its rows.

    Args:
        folder: A path, or a URL that fsspec opens.
        storage_options: What the file system of a URL is told.

    Raises:
        FileNotFoundError: There is no store.
        ValueError: Its index is damaged, or of another version.
    """

    def __init__(
        self, folder: str | Path, *, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        self._folder = open_folder(folder, storage_options)
        self.index = read_index(self._folder)

    def __repr__(self) -> str:
        return (
            f"ActivationStore at {self._folder}: {self.n_rows:,} rows to train on and "
            f"{self.n_held_out_rows:,} held out, {len(self.hooks)} hooks, {self.index.dtype}"
        )

    @property
    def hooks(self) -> list[str]:
        """Hook names."""
        return list(self.index.hooks)

    @property
    def n_rows(self) -> int:
        """Rows to train on."""
        return self.index.n_rows(TRAIN)

    @property
    def n_held_out_rows(self) -> int:
        """Rows that training never sees."""
        return self.index.n_rows(HELD_OUT)

    def verify(self) -> None:
        """Reads every byte of the store, and compares it with what was written.

        Raises:
            ValueError: A file is missing, cut off or changed; all such files are named.
        """
        damage = find_damage(self._folder, self.index)
        if damage:
            found = "; ".join(f"{name} {what}" for name, what in damage.items())
            raise ValueError(
                f"{self._folder} is damaged: {found}. The other "
                f"{len(self.index.files) - len(damage)} files are as they were written."
            )


def cache_activations(
    stream: ActivationStream,
    folder: str | Path,
    n_tokens: int | None = None,
    *,
    held_out_tokens: int | None = None,
    dtype: str | None = None,
    shuffle: bool = True,
    resume: bool = False,
    append: bool = False,
    rows_per_shard: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ActivationStore:
    """Writes the activations of a stream, all its hooks in one pass.

    Held-out rows go to shards of their own, with the text that they are from, so that `measure`
    on the store reads what `measure` on the stream would. Each row keeps its token id and its
    position, if the stream has tokens.

    A row is safe once the index names its shard; what a kill leaves beside that is deleted by the
    next writer. Writing holds three shards in memory, and the buffer of the stream.

    Args:
        stream: Where rows come from.
        folder: A new folder, or a URL that fsspec opens ("s3://bucket/acts").
        n_tokens: Rows to store for training; None for all. No row is stored twice, so there are
            fewer if an epoch has fewer: `n_rows` of the store says how many.
        held_out_tokens: Rows to store of those held out; None for a tenth of `n_tokens`, or
            all if there are fewer; 0 for none.
        dtype: "float32", "bfloat16", "float16" or "int8"; None for that of the stream. int8 has
            a scale for each row, and moves no value by more than 1/254 of the largest magnitude
            of its row.
        shuffle: Stores training rows in the stream's random order; False in that of its source
            (contexts as they stand in the text). Reading shuffles either way.
        resume: Goes on where an interrupted call with the same stream stopped, or begins if
            there is nothing; the store ends as if it had not been interrupted. The stream is
            drawn again from its start and stored rows are passed over, so that the model
            reads their text again. A larger `n_tokens` makes a store longer.
        append: Adds the rows of another stream of the same model, hooks and dtype.
        rows_per_shard: None for as many as make 128 MiB.
        storage_options: What the file system of a URL is told.
        progress: Whether to draw a progress bar on standard error.

    Raises:
        FileExistsError: The folder holds files, and neither `resume` nor `append` is set.
        BlockingIOError: Another process is writing there.
        ValueError: An option is out of range, values are beyond the range of the dtype, the
            store is damaged or of another version, or it is of another model, of other hooks
            or, with `resume`, of another stream.
        OSError: The disk is full, or failed. The message says how many rows are safe.
    """
    check_options(stream, n_tokens, held_out_tokens, dtype, rows_per_shard, resume, append)
    place = open_folder(folder, storage_options)
    run = StoredRun(
        seed=stream.seed,
        batch_size=stream.batch_size,
        buffer_rows=stream.buffer_rows,
        n_source_rows=stream.n_rows,
        n_source_held_out_rows=stream.n_held_out_rows,
        is_shuffled=shuffle,
        n_tokens=n_tokens,
    )
    is_welcome = resume or append
    # Refused before the folder is made, or touched.
    index = existing_index(place, is_welcome)
    new = new_index(stream, dtype or (index.dtype if index else None), shuffle)
    with WriterLock(place) as lock:
        # Another writer may have been there in between.
        index = existing_index(place, is_welcome) or new
        check_same_kind(place, index, new)
        rows = rows_per_shard or max(1, SHARD_BYTES // index.row_bytes)
        writer = StoreWriter(place, index, lock, rows)
        writer.remove_leftovers()
        if append or not index.runs:
            index.runs.append(run)
            writer.publish()
        else:
            check_same_stream(place, index, run)
        index.runs[-1].n_tokens, index.runs[-1].is_complete = n_tokens, False
        n_train, n_held_out = _n_wanted(stream, n_tokens, held_out_tokens)
        _save_contexts(writer, stream, n_held_out)
        _write_rows(writer, place, stream, {HELD_OUT: n_held_out, TRAIN: n_train}, progress)
    return ActivationStore(folder, storage_options=storage_options)


def _write_rows(
    writer: StoreWriter,
    place: LocalFolder | RemoteFolder,
    stream: ActivationStream,
    wanted: dict[str, int],
    progress: bool,
) -> None:
    index = writer.index
    run = index.runs[-1]
    number = len(index.runs) - 1
    with progress_bar(
        total=sum(wanted.values()), unit="tok", desc="caching", shown=progress
    ) as bar:
        for split, n_wanted in wanted.items():
            n_done = index.n_rows(split, number)
            if n_done >= n_wanted:
                bar.update(n_done)
                continue
            batches = (
                stream.held_out_batches(n_wanted, with_tokens=True)
                if split == HELD_OUT
                else stream.epoch(shuffle=run.is_shuffled, with_tokens=True)
            )
            for n_passed, batch in _first(batches, n_wanted):
                n_rows = len(next(iter(batch.values())))
                n_known = min(max(n_done - n_passed, 0), n_rows)
                if n_passed == 0 and n_known:
                    check_first_rows(place, index, split, batch)
                if n_known < n_rows:
                    writer.add(split, {name: x[n_known:] for name, x in batch.items()})
                bar.update(n_rows)
            writer.flush(split)
            run.left_out[split] = asdict(stream.left_out)
    run.is_complete = True
    writer.publish()


def _first(batches: Iterator[Batch], n_rows: int) -> Iterator[tuple[int, Batch]]:
    """The first rows, in batches, each with the number of rows before it."""
    n_passed = 0
    for batch in batches:
        part = {name: x[: n_rows - n_passed] for name, x in batch.items()}
        yield n_passed, part
        n_passed += len(next(iter(part.values())))
        if n_passed >= n_rows:
            return


def _n_wanted(
    stream: ActivationStream, n_tokens: int | None, held_out_tokens: int | None
) -> tuple[int, int]:
    n_train = stream.n_rows if n_tokens is None else min(n_tokens, stream.n_rows)
    if held_out_tokens is None:
        held_out_tokens = max(1, (n_tokens or 10 * stream.n_held_out_rows) // 10)
    return n_train, min(held_out_tokens, stream.n_held_out_rows)


def _save_contexts(writer: StoreWriter, stream: ActivationStream, n_held_out: int) -> None:
    """Keeps the contexts of the held-out rows: as many as those rows need, none left out."""
    tokens: Tokens | None = stream.held_out_tokens
    if tokens is None or n_held_out == 0:
        return
    n_counted = tokens.counts.sum(dim=1).cumsum(0)
    n_contexts = int((n_counted < n_held_out).sum()) + 1
    kept = [one for one in writer.index.held_out_contexts if one.run == len(writer.index.runs) - 1]
    if not kept or kept[0].n_rows < n_contexts:
        writer.save_contexts(tokens.first(n_contexts))
        writer.publish()
