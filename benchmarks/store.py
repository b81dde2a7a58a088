"""What reading stored activations costs: bytes per second, against copying the same bytes.

The ways take turns on the same rows, all in the page cache, in batches of 4096 rows:

- memcpy: every batch copied out of a tensor in memory, in order: `rows[a:b].clone()`;
- store: an epoch of `ActivationStream.from_store`, rows stored in random order (the default);
- mixed: the same of a store in the order of the text, whose rows are mixed while they are read;
- datasets: Hugging Face `datasets` with torch format, an Arrow file of rows read in order;
- sae_lens: SAELens's cached store, its own Arrow layout and its mixing buffer.

One row: gigabytes per second of each way, and how many times as fast as another the store is (a
goal: 0.7 of memcpy).

    python benchmarks/store.py --out benchmarks/results/store.csv
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import in_turn, ratio, seconds_of, where, write_row

import saefeat as sf

BATCH_ROWS = 4096
CONTEXT_SIZE = 128
HOOK = "blocks.0.hook_resid_post"


@dataclass
class Options:
    out: Path = Path("store.csv")
    megabytes: int = 256
    """Of the rows, in float32."""
    width: int = 576
    rounds: int = 5
    warm_up: int = 1
    """Rounds before those that count."""


def main(options: Options) -> None:
    row_bytes = 4 * options.width
    n_rows = max(2, int(options.megabytes * 1e6 / row_bytes) // BATCH_ROWS) * BATCH_ROWS
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n_rows, options.width, generator=generator)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stream = sf.ActivationStream.from_tensors({HOOK: rows}, held_out_fraction=0)
        write_seconds = seconds_of(
            lambda: sf.cache_activations(stream, folder / "store", progress=False), cpu
        )
        sf.cache_activations(stream, folder / "in_order", shuffle=False, progress=False)
        ways: dict[str, Callable[[int], object]] = {
            "memcpy": lambda _: copy(rows),
            "store": reader(sf.ActivationStream.from_store(folder / "store")),
            "mixed": reader(sf.ActivationStream.from_store(folder / "in_order")),
            "datasets": datasets_reader(rows, folder / "datasets"),
            "sae_lens": sae_lens_reader(rows, folder / "sae_lens"),
        }
        seconds = in_turn(ways, rounds=options.rounds, warm_up=options.warm_up, device=cpu)
    gigabytes = rows.nbytes / 1e9
    row: dict[str, Any] = {
        **where(cpu),
        "megabytes": round(1000 * gigabytes),
        "width": options.width,
        "rounds": options.rounds,
        "write_gb_per_s": f"{gigabytes / write_seconds:.2f}",
    }
    for way in ways:
        row[f"{way}_gb_per_s"] = f"{gigabytes / statistics.median(seconds[way]):.2f}"
    for way in ("memcpy", "datasets", "sae_lens"):
        row[f"store_over_{way}"] = f"{ratio(seconds[way], seconds['store']):.3f}"
    row["mixed_over_memcpy"] = f"{ratio(seconds['memcpy'], seconds['mixed']):.3f}"
    write_row(options.out, row)


def copy(rows: torch.Tensor) -> None:
    for start in range(0, len(rows), BATCH_ROWS):
        rows[start : start + BATCH_ROWS].clone()


def reader(stream: sf.ActivationStream) -> Callable[[int], None]:
    def read(round_: int) -> None:
        for _ in stream:
            pass

    return read


def datasets_reader(rows: torch.Tensor, folder: Path) -> Callable[[int], None]:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {HOOK: datasets.Sequence(datasets.Value("float32"), length=rows.shape[1])}
    )
    datasets.Dataset.from_dict({HOOK: rows.numpy()}, features).save_to_disk(str(folder))
    opened = datasets.load_from_disk(str(folder)).with_format("torch")

    def read(round_: int) -> None:
        for batch in opened.iter(batch_size=BATCH_ROWS):
            assert batch[HOOK].shape == (BATCH_ROWS, rows.shape[1])

    return read


def sae_lens_reader(rows: torch.Tensor, folder: Path) -> Callable[[int], None]:
    """The layout that SAELens's CacheActivationsRunner writes, read by its ActivationsStore."""
    import datasets
    from sae_lens.training.activations_store import ActivationsStore

    features = datasets.Features(
        {HOOK: datasets.Array2D(shape=(CONTEXT_SIZE, rows.shape[1]), dtype="float32")}
    )
    contexts = rows.view(-1, CONTEXT_SIZE, rows.shape[1]).numpy()
    datasets.Dataset.from_dict({HOOK: contexts}, features).save_to_disk(str(folder))
    n_contexts = BATCH_ROWS // CONTEXT_SIZE

    def read(round_: int) -> None:
        store = ActivationsStore(
            model=None,
            dataset=None,
            streaming=False,
            hook_name=HOOK,
            hook_head_index=None,
            context_size=CONTEXT_SIZE,
            d_in=rows.shape[1],
            # Counted in contexts: 16 batches, as ours has.
            n_batches_in_buffer=16 * n_contexts,
            total_training_tokens=len(rows),
            store_batch_size_prompts=n_contexts,
            train_batch_size_tokens=BATCH_ROWS,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(folder),
        )
        for _ in range(len(rows) // BATCH_ROWS):
            store.next_batch()

    return read


if __name__ == "__main__":
    main(tyro.cli(Options))
