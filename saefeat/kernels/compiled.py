"""Loops compiled to machine code, and the threads that share rows among them.

numba compiles on first use (seconds, then kept on disk) and the loops release the interpreter's
lock. Threads are this module's own, not numba's, whose pools do not bear forks or two callers.
"""

import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import torch

SMALLEST_SHARE = 64
"""Rows below which another thread costs more than it saves."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as machine code, kept on disk between runs."""
    # Tests wrap each function to check shapes; what numba reads is the plain one inside.
    plain = inspect.unwrap(function)
    # No "nnan" and "ninf": latents that are out of the running score minus infinity.
    allowed = {"contract", "reassoc", "arcp"}
    made: Callable[..., Any] = numba.njit(
        nogil=True, fastmath=allowed, cache=True, error_model="numpy"
    )(plain)
    return made


def share_rows(function: Callable[..., None], n_rows: int, *arguments: Any) -> None:
    """Call `function(low, high, *arguments)` for ranges of rows, one for each thread of torch."""
    n_threads = min(torch.get_num_threads(), max(1, n_rows // SMALLEST_SHARE))
    bounds = [n_rows * thread // n_threads for thread in range(n_threads + 1)]
    own, *others = pairwise(bounds)
    tasks = []
    if others:
        helpers = _helpers(os.getpid(), torch.get_num_threads() - 1)
        tasks = [helpers.submit(function, *bound, *arguments) for bound in others]
    function(*own, *arguments)
    for task in tasks:
        task.result()


@cache
def _helpers(process_id: int, n_threads: int) -> ThreadPoolExecutor:
    """Threads that work beside the caller, for as long as the process lives.

    A fork inherits no threads, so that each process has its own.
    """
    helpers = ThreadPoolExecutor(n_threads, thread_name_prefix="saefeat")
    helpers.submit(_end_spinning).result()
    return helpers


def _end_spinning() -> None:
    """Have GNU OpenMP's threads, which torch computes with, leave the processors when idle.

    After each operator they wait for the next one spinning, for milliseconds, and our threads
    wait for them: a training step took 87 ms instead of 60. They stop at once where OpenMP has
    more threads than there are processors, and an operator that another thread runs, this one,
    makes them more.
    """
    torch.ones(1 << 17).add_(1)
