"""What reading stored activations costs: bytes per second, against copying the same bytes.

The ways take turns on the same rows, all in the page cache, in batches of 4096 rows:

- memcpy: every batch copied out of a tensor in memory, in order: `rows[a:b].clone()`;
- store: an epoch of `ActivationStream.from_store`, rows stored in random order (the default);
- mixed: the same of a store in the order of the text, whose rows are mixed while they are read;
- datasets: Hugging Face `datasets` with torch format, an Arrow file of rows read in order;
- sae_lens: SAELens's cached store, its own Arrow layout and its mixing buffer.

Prints a CSV header and one row. The ratios are medians over the rounds of the ratio within a
round, so that a machine that slows down for a while slows all sides down.

    python benchmarks/store.py [megabytes] [rounds] [width]
"""

import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harvest import commit, processor, seconds_of

import saefeat as sf

BATCH_ROWS = 4096
CONTEXT_SIZE = 128
HOOK = "blocks.0.hook_resid_post"


def main(megabytes: int = 256, rounds: int = 5, width: int = 576) -> None:
    n_rows = max(2, int(megabytes * 1e6 / 4 / width) // BATCH_ROWS) * BATCH_ROWS
    rows = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(0))
    n_bytes = rows.nbytes
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stream = sf.ActivationStream.from_tensors({HOOK: rows}, held_out_fraction=0)
        write_seconds = seconds_of(
            lambda: sf.cache_activations(stream, folder / "store", progress=False), cpu
        )
        sf.cache_activations(stream, folder / "in_order", shuffle=False, progress=False)
        ways: dict[str, Callable[[], None]] = {
            "memcpy": lambda: copy(rows),
            "store": reader(sf.ActivationStream.from_store(folder / "store")),
            "mixed": reader(sf.ActivationStream.from_store(folder / "in_order")),
            "datasets": datasets_reader(rows, folder / "datasets"),
            "sae_lens": sae_lens_reader(rows, folder / "sae_lens"),
        }
        for run in ways.values():
            run()
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for round_ in range(rounds):
            for way in list(ways) if round_ % 2 == 0 else list(reversed(ways)):
                seconds[way].append(seconds_of(ways[way], cpu))
    row: dict[str, Any] = {
        "processor": processor(cpu),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "megabytes": round(n_bytes / 1e6),
        "width": width,
        "rounds": rounds,
        "write_gb_per_s": f"{n_bytes / 1e9 / write_seconds:.2f}",
    }
    for way in ways:
        row[f"{way}_gb_per_s"] = f"{n_bytes / 1e9 / statistics.median(seconds[way]):.2f}"
    for way in ("memcpy", "datasets", "sae_lens"):
        ratios = [b / a for a, b in zip(seconds["store"], seconds[way], strict=True)]
        row[f"store_over_{way}"] = f"{statistics.median(ratios):.3f}"
    print(",".join(row))
    print(",".join(str(value).replace(",", " ") for value in row.values()))


def copy(rows: torch.Tensor) -> None:
    for start in range(0, len(rows), BATCH_ROWS):
        rows[start : start + BATCH_ROWS].clone()


def reader(stream: sf.ActivationStream) -> Callable[[], None]:
    def read() -> None:
        for _ in stream:
            pass

    return read


def datasets_reader(rows: torch.Tensor, folder: Path) -> Callable[[], None]:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {HOOK: datasets.Sequence(datasets.Value("float32"), length=rows.shape[1])}
    )
    datasets.Dataset.from_dict({HOOK: rows.numpy()}, features).save_to_disk(str(folder))
    opened = datasets.load_from_disk(str(folder)).with_format("torch")

    def read() -> None:
        for batch in opened.iter(batch_size=BATCH_ROWS):
            assert batch[HOOK].shape == (BATCH_ROWS, rows.shape[1])

    return read


def sae_lens_reader(rows: torch.Tensor, folder: Path) -> Callable[[], None]:
    """The layout that SAELens's CacheActivationsRunner writes, read by its ActivationsStore."""
    import datasets
    from sae_lens.training.activations_store import ActivationsStore

    features = datasets.Features(
        {HOOK: datasets.Array2D(shape=(CONTEXT_SIZE, rows.shape[1]), dtype="float32")}
    )
    contexts = rows.view(-1, CONTEXT_SIZE, rows.shape[1]).numpy()
    datasets.Dataset.from_dict({HOOK: contexts}, features).save_to_disk(str(folder))
    n_contexts = BATCH_ROWS // CONTEXT_SIZE

    def read() -> None:
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
    warnings.simplefilter("ignore")
    main(*(int(argument) for argument in sys.argv[1:]))
