"""Calls made in several processes at a time, one thread each."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

SECONDS_BETWEEN_LOOKS = 2.0


def run_in_processes(
    function: Callable[..., Result],
    calls: Sequence[tuple[Any, ...]],
    processes: int,
    *,
    look: Callable[[], None] = lambda: None,
) -> list[Result]:
    """What `function` returns for each tuple of arguments, in their order.

    Args:
        function: Of a module, so that another process finds it.
        calls: Arguments, which can be pickled where there are processes to send them to.
        processes: At a time; 1 makes the calls here.
        look: Called every two seconds and after each call, to draw progress.

    Raises:
        Exception: What a call has raised; those that have not begun are not made then.
    """
    if processes == 1 or len(calls) < 2:
        results = []
        for arguments in calls:
            results.append(function(*arguments))
            look()
        return results
    with ProcessPoolExecutor(
        min(processes, len(calls)),
        # Threads of numba and OpenMP do not survive a fork.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        futures = [pool.submit(function, *arguments) for arguments in calls]
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                for one in done:
                    one.result()
                look()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [one.result() for one in futures]
