"""Whatever is done to a store, it holds exactly the rows that it acknowledged."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import saefeat as sf
from saefeat.activations.sources import LeftOut
from saefeat.activations.store_index import HELD_OUT, INDEX_NAME, TRAIN

N_ROWS = 60


@cache
def stream(seed: int) -> sf.ActivationStream:
    x = torch.randn(N_ROWS, 3, generator=torch.Generator().manual_seed(seed))
    return sf.ActivationStream.from_tensors(
        {"a": x, "b": -x[:, :1]}, batch_size=7, seed=seed, held_out_fraction=0.2
    )


@cache
def rows_of(seed: int, split: str) -> torch.Tensor:
    """All rows of the hook a, in the order that they are stored in."""
    batches = stream(seed) if split == TRAIN else stream(seed).held_out_batches()
    return torch.cat([batch["a"] for batch in batches])


class Killed(BaseException):
    """Stands for the end of the process: nothing on disk changes after it."""


@contextmanager
def killed_at(step: int | None, share: float) -> Iterator[None]:
    """Kills at the step that changes the disk for the `step`-th time, a part of it done.

    As after a real kill, no clean-up is done: every later change raises too. What stays is the
    kernel's part, a lock is let go of.
    """
    real = {name: getattr(Path, name) for name in ("write_bytes", "replace", "unlink")}
    n_steps = 0

    def counted(name: str) -> Any:
        def change(self: Path, *args: Any, **options: Any) -> Any:
            nonlocal n_steps
            n_steps += 1
            if step is None or n_steps < step:
                return real[name](self, *args, **options)
            if n_steps == step:
                if name == "write_bytes":
                    real[name](self, args[0][: int(share * len(args[0]))])
                elif share > 0.5:
                    real[name](self, *args, **options)
            raise Killed

        return change

    try:
        for name in real:
            setattr(Path, name, counted(name))
        yield
    finally:
        for name, method in real.items():
            setattr(Path, name, method)


STEPS = st.fixed_dictionaries(
    {
        "how": st.sampled_from(["resume", "append"]),
        "n_tokens": st.integers(1, 50),
        "held_out_tokens": st.integers(0, 12),
        "rows_per_shard": st.integers(1, 20),
        "kill_at": st.none() | st.integers(1, 25),
        "share": st.floats(0, 1),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=6))
def test_appends_kills_and_resumptions_keep_exactly_the_acknowledged_rows(
    steps: list[dict[str, Any]],
) -> None:
    logging.getLogger("saefeat.core.locks").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "acts"
        acknowledged: dict[tuple[int, str], int] = {}
        for step in steps:
            runs = sf.ActivationStore(folder).index.runs if has_index(folder) else []
            adds = step["how"] == "append" or not runs
            seed = len(runs) if adds else runs[-1].seed
            killed = False
            with killed_at(step["kill_at"], step["share"]):
                try:
                    sf.cache_activations(
                        stream(seed),
                        folder,
                        step["n_tokens"],
                        held_out_tokens=step["held_out_tokens"],
                        rows_per_shard=step["rows_per_shard"],
                        progress=False,
                        **{step["how"]: True},
                    )
                except Killed:
                    killed = True
            found = stored(folder)
            for key, n in acknowledged.items():
                assert found[key] >= n, "an acknowledged row is gone"
            if not killed:
                run = len(sf.ActivationStore(folder).index.runs) - 1
                for split, wanted, n_all in (
                    (TRAIN, step["n_tokens"], 48),
                    (HELD_OUT, step["held_out_tokens"], 12),
                ):
                    before = acknowledged.get((run, split), 0)
                    assert found.get((run, split), 0) == max(before, min(wanted, n_all))
                names = {path.name for path in folder.iterdir()}
                index = sf.ActivationStore(folder).index
                assert names == {INDEX_NAME, *(one.file for one in index.files)}
            acknowledged = found


def has_index(folder: Path) -> bool:
    return (folder / INDEX_NAME).exists()


def stored(folder: Path) -> dict[tuple[int, str], int]:
    """Rows by run and split; they are those of the streams, whole, in order, and undamaged."""
    if not has_index(folder):
        return {}
    store = sf.ActivationStore(folder)
    store.verify()
    counts = {
        (run, split): store.index.n_rows(split, run)
        for run in range(len(store.index.runs))
        for split in (TRAIN, HELD_OUT)
    }
    if store.n_rows:
        opened = sf.ActivationStream.from_store(folder, batch_size=11)
        for split in (TRAIN, HELD_OUT):
            if store.index.n_rows(split) == 0:
                continue
            batches = opened.epoch(shuffle=False) if split == TRAIN else opened.held_out_batches()
            expected = []
            for shard in store.index.shards:
                if shard.split == split:
                    first = sum(len(x) for run, x in expected if run == shard.run)
                    seed = store.index.runs[shard.run].seed
                    rows = rows_of(seed, split)[first : first + shard.n_rows]
                    expected.append((shard.run, rows))
            given_rows = torch.cat([batch["a"] for batch in batches])
            assert torch.equal(given_rows, torch.cat([rows for _, rows in expected]))
    return counts


@settings(max_examples=25, deadline=None)
@given(
    n_rows=st.integers(2, 300),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8"]),
    rows_per_shard=st.integers(20, 150),
    shuffle=st.booleans(),
    batch_size=st.integers(1, 64),
    window=st.none() | st.integers(1, 20),
    seed=st.integers(0, 3),
)
def test_every_epoch_gives_every_row_once_however_it_is_cut(
    n_rows: int,
    widths: list[int],
    dtype: str,
    rows_per_shard: int,
    shuffle: bool,
    batch_size: int,
    window: int | None,
    seed: int,
) -> None:
    # Small whole numbers, the largest in each row being 127, are exact in every dtype.
    numbers = np.arange(n_rows)
    digits = np.stack([np.full(n_rows, 127), numbers % 100, numbers // 100], axis=1)
    tensors = {
        f"hook {i}": torch.from_numpy(np.tile(digits, (1, 14))[:, : width + 2]).float()
        for i, width in enumerate(widths)
    }
    given_stream = sf.ActivationStream.from_tensors(tensors, batch_size=32, held_out_fraction=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "acts"
        sf.cache_activations(
            given_stream,
            folder,
            dtype=dtype,
            shuffle=shuffle,
            rows_per_shard=rows_per_shard,
            progress=False,
        )
        opened = sf.ActivationStream.from_store(
            folder,
            batch_size=batch_size,
            buffer_rows=None if window is None else window * batch_size,
            seed=seed,
        )
        # Over two epochs, in batches that do not end with them.
        batches = list(opened.batches(2 * n_rows))
        rows = {hook: torch.cat([batch[hook] for batch in batches]).long() for hook in tensors}
        first = rows["hook 0"]
        where = first[:, 1] + 100 * (first[:, 2] if first.shape[1] > 2 else 0)
        for epoch in (where[:n_rows], where[n_rows:]):
            assert sorted(epoch.tolist()) == list(range(n_rows))
        for hook, tensor in tensors.items():
            assert torch.equal(rows[hook], tensor[where].long()), "hooks are not aligned"
        # Any cut of the order gives the same rows.
        source: Any = opened._source
        for batch, start in zip(opened, range(0, n_rows, batch_size), strict=True):
            stop = min(start + batch_size, n_rows)
            middle = (start + stop) // 2
            parts = [
                source.shuffled_rows(seed, 0, a, b, LeftOut())["hook 0"]
                for a, b in ((middle, stop), (start, middle))
                if a < b
            ]
            both = [torch.cat(parts).tolist(), batch["hook 0"].tolist()]
            assert sorted(both[0]) == sorted(both[1])


def test_the_simulated_kill_leaves_what_a_real_one_would() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "file"
        with killed_at(2, 0.5):
            path.write_bytes(b"abcd")
            with suppress(Killed):
                path.write_bytes(b"efgh")
            with suppress(Killed):
                path.unlink()
        assert path.read_bytes() == b"ef"
        assert os.listdir(name) == ["file"]
