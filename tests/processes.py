"""Processes of torch.distributed on loopback, forked so that nothing has to be imported again."""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saefeat.core.distributed import process_group

LONGEST_SECONDS = 120.0
"""After which processes that still run are taken to hang."""


class KilledError(Exception):
    """A process ended without a word."""


def together(
    folder: Path, function: Callable[..., Any], *arguments: Any, size: int = 2, timeout: float = 60
) -> list[Any]:
    """What a function gives in each of several processes; or, in its place, what it raised.

    Each is left to itself: one that fails does not end the others, as torchrun would.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place in folder.glob("outcome-*"):
        place.unlink()
    running = _ended(folder, function, arguments, size, timeout)
    if all(one.is_alive() for one in running):
        # A fork may have inherited a lock that a thread of the tests held. What hangs by itself
        # does so again.
        _abort(running)
        running = _ended(folder, function, arguments, size, timeout)
    hanging = [rank for rank, one in enumerate(running) if one.is_alive()]
    _abort(running)
    assert not hanging, f"processes {hanging} of {size} hang"
    outcomes = []
    for rank, one in enumerate(running):
        place = folder / f"outcome-{rank}"
        outcomes.append(
            pickle.loads(place.read_bytes()) if place.is_file() else KilledError(str(one.exitcode))
        )
    return outcomes


def _ended(
    folder: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    size: int,
    timeout: float,
) -> list[Any]:
    """The processes, once they have ended or are taken to hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(size):
        one = multiprocessing.get_context("fork").Process(
            target=_child,
            args=(rank, size, port, timeout, folder / f"outcome-{rank}", function, arguments),
        )
        with warnings.catch_warnings():
            # From Python 3.12 on, of any process with threads.
            warnings.simplefilter("ignore", DeprecationWarning)
            one.start()
        running.append(one)
    ends = time.monotonic() + LONGEST_SECONDS
    for one in running:
        one.join(max(0.0, ends - time.monotonic()))
    return running


def _abort(running: list[Any]) -> None:
    """Ends those that still run, which pytest has print where they are."""
    for one in running:
        if one.is_alive():
            os.kill(one.pid, signal.SIGABRT)
            one.join(10)
            one.kill()


def results(*arguments: Any, **options: Any) -> list[Any]:
    """What `together` gives, where nothing may fail."""
    outcomes = together(*arguments, **options)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def _child(
    rank: int,
    size: int,
    port: int,
    timeout: float,
    place: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    # Threads of OpenMP do not survive a fork.
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        with process_group(timeout):
            outcome = function(*arguments)
    except BaseException as error:
        print(f"process {rank}: {traceback.format_exception_only(error)[-1]}", file=sys.stderr)
        outcome = error
    place.write_bytes(pickle.dumps(outcome))
    # Not through what the parent had still to do at its end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
