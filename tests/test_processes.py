"""The library in the forks of a data loader, in threads, and inside a running event loop."""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import saefeat as sf

N_ROWS = 1000


@pytest.fixture(scope="module")
def stream() -> sf.ActivationStream:
    x = torch.randn(N_ROWS, 16, generator=torch.Generator().manual_seed(0))
    return sf.ActivationStream.from_tensors({"a": x}, batch_size=200)


def train(stream: sf.ActivationStream, out: Path | None = None) -> sf.Bank:
    return sf.train(
        stream,
        sf.MatchingPursuitConfig(k=4),
        expansion_factors=[2],
        n_tokens=600,
        out=out,
        checkpoint_every=2,
        progress=False,
    )


def decoder(bank: sf.Bank) -> torch.Tensor:
    return bank["a", 2, 0].W_dec


def test_two_forked_workers_of_a_data_loader_read_encode_and_train(
    stream: sf.ActivationStream, tmp_path: Path
) -> None:
    sf.cache_activations(stream, tmp_path / "acts", dtype="float32", progress=False)
    here = Path(__file__).parent
    finished = subprocess.run(
        [sys.executable, here / "forked_work.py", tmp_path / "acts"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(here.parent)},
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "the same in [0, 1]\n"


def test_threads_train_at_the_same_time_what_one_alone_does(tmp_path: Path) -> None:
    # A stream is an iterator's state, so that each thread has its own.
    def work(number: int) -> torch.Tensor:
        x = torch.randn(N_ROWS, 16, generator=torch.Generator().manual_seed(0))
        own = sf.ActivationStream.from_tensors({"a": x}, batch_size=200)
        return decoder(train(own, tmp_path / str(number)))

    assert threading.current_thread() is threading.main_thread()
    alone = work(0)
    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(work, [1, 2]):
            assert torch.equal(found, alone)


def test_a_running_event_loop_as_in_a_notebook_is_no_hindrance(
    stream: sf.ActivationStream, tmp_path: Path
) -> None:
    async def cell() -> str:
        bank = train(stream, tmp_path / "run")
        # fsspec's remote file systems have a loop of their own.
        url = "memory://bucket/in-a-loop"
        sf.cache_activations(stream, url, 50, held_out_tokens=10, progress=False)
        again = sf.ActivationStream.from_store(url, batch_size=10)
        return sf.measure(bank, again, n_tokens=10, progress=False)._repr_html_()

    assert "<table" in asyncio.run(cell())
