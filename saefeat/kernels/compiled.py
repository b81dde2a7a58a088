"""Loops compiled to machine code, and the threads that share rows among them.

numba compiles on first use (seconds, then kept on disk) and the loops release the interpreter's
lock. Threads are this module's own, not numba's, whose pools do not bear forks or two callers.
"""

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
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
    if n_threads == 1:
        function(0, n_rows, *arguments)
        return
    bounds = np.linspace(0, n_rows, n_threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(n_threads) as pool:
        for task in [pool.submit(function, *bound, *arguments) for bound in pairwise(bounds)]:
            task.result()
