"""The processes that work together, by torch.distributed; one alone unless several were started.

Every method of `Ranks` that talks to the others is a collective: all processes have to call it, in
the same order and from one thread.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor

PATIENCE = timedelta(hours=12)
"""How long the others wait for what the first process does alone, such as writing a checkpoint."""

Result = TypeVar("Result")


class PeerLostError(ConnectionError):
    """Another process ended or hangs, so that this one cannot go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The processes that work together, as one of them sees it."""

    rank: int = 0
    """Number of this process."""
    size: int = 1
    """How many they are."""
    patient: Any = None
    """The group, on processors, by which the others wait for the first; None for one alone."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def part(self, n: int) -> slice:
        """This process's share of n things: a run of them, all runs being of about one length."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sharing(self, n: int) -> "Ranks":
        """Those among whom a batch of n rows is split: all, or, if some got none, each alone."""
        return self if n >= self.size else ALONE

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; the same bits in each."""
        return self._reduced(tensor, "SUM")

    def maximum(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over all processes, in place."""
        return self._reduced(tensor, "MAX")

    def sum_each(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of several tensors of one dtype, by one collective."""
        if self.size == 1 or not tensors:
            return dict(tensors)
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors.values()]))
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        return {
            name: part.view(tensor.shape)
            for (name, tensor), part in zip(tensors.items(), parts, strict=True)
        }

    def stacked(self, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The tensors of all processes, of one shape, along a new first dimension."""
        if self.size == 1:
            return tensor[None]
        out = tensor.new_empty(self.size, *tensor.shape)
        with _naming_the_cause():
            dist.all_gather(list(out.unbind()), tensor.contiguous())
        return out

    def rows(
        self, x: Float[Tensor, "m d"], places: Int[Tensor, " k"] | slice, n: int
    ) -> Float[Tensor, "k d"]:
        """Any rows of a matrix of n rows, of which each process holds its `part`."""
        if self.size == 1:
            return x[places]
        if isinstance(places, slice):
            places = torch.arange(n, device=x.device)[places]
        own = self.part(n)
        inside = (places >= own.start) & (places < own.stop)
        found = x[(places - own.start).clamp(0, len(x) - 1)]
        # A sum with zeros changes nothing, and no index depends on the data.
        return self.sum(torch.where(inside[:, None], found, 0.0))

    def whole(self, x: Float[Tensor, "m d"], n: int) -> Float[Tensor, "n d"]:
        """All rows of such a matrix."""
        return x if self.size == 1 else self.rows(x, slice(n), n)

    def tensors_of(
        self, source: int, tensors: Mapping[str, Shaped[Tensor, "..."]] | None
    ) -> dict[str, Tensor]:
        """The tensors of one process, for all; what the others pass is not looked at.

        They travel as bytes, in one piece for each device that they are on.
        """
        if self.size == 1:
            return dict(tensors or {})
        mine = dict(tensors or {}) if self.rank == source else {}
        facts = {name: (list(x.shape), x.dtype, x.device.type) for name, x in mine.items()}
        facts = self.told(facts, source)
        received: dict[str, Tensor] = {}
        for device in dict.fromkeys(device for _, _, device in facts.values()):
            here = {name: fact for name, fact in facts.items() if fact[2] == device}
            n_bytes = sum(_n_bytes(shape, dtype) for shape, dtype, _ in here.values())
            if self.rank == source:
                flat = torch.cat([_bytes_of(mine[name]) for name in here])
            else:
                flat = torch.empty(n_bytes, dtype=torch.uint8, device=device)
            with _naming_the_cause():
                dist.broadcast(flat, source)
            received |= _unpacked(here, flat)
        return {name: received[name] for name in facts}

    def exchange(
        self, outgoing: Sequence[Mapping[str, Shaped[Tensor, "..."]]]
    ) -> list[dict[str, Tensor]]:
        """Hands tensors to each process, and gets what each has for this one, by rank.

        What is for one process is all on one device.
        """
        if self.size == 1:
            return [dict(one) for one in outgoing]
        mine = [
            {name: (list(x.shape), x.dtype, x.device.type) for name, x in one.items()}
            for one in outgoing
        ]
        facts = [of_all[self.rank] for of_all in self.each(mine)]
        # The same tensors for several processes are put together once.
        flat = {id(one): torch.cat([_bytes_of(x) for x in one.values()]) for one in outgoing if one}
        received = [
            torch.empty(
                sum(_n_bytes(shape, dtype) for shape, dtype, _ in one.values()),
                dtype=torch.uint8,
                device=next(iter(one.values()))[2] if one else "cpu",
            )
            for one in facts
        ]
        others = [rank for rank in range(self.size) if rank != self.rank]
        sends = [
            dist.P2POp(dist.isend, flat[id(outgoing[rank])], rank)
            for rank in others
            if outgoing[rank]
        ]
        receives = [dist.P2POp(dist.irecv, received[rank], rank) for rank in others if facts[rank]]
        if sends or receives:
            with _naming_the_cause():
                for request in dist.batch_isend_irecv([*sends, *receives]):
                    request.wait()
        found = [_unpacked(one, bits) for one, bits in zip(facts, received, strict=True)]
        found[self.rank] = dict(outgoing[self.rank])
        return found

    def told(self, value: Result, source: int = 0) -> Result:
        """A value of one process, for all; it is waited for as long as it takes."""
        if self.size == 1:
            return value
        box = [value]
        with _naming_the_cause():
            dist.broadcast_object_list(box, source, group=self.patient)
        return box[0]

    def each(self, value: Result) -> list[Result]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _naming_the_cause():
            dist.all_gather_object(values, value, group=self.patient)
        return values

    def on_first(self, action: Callable[[], Result]) -> Result | None:
        """What the first process gets from `action`, and None for the others.

        Raises:
            Exception: What it raised, in every process.
        """
        if self.size == 1:
            return action()
        result: Result | None = None
        error: Exception | None = None
        if self.is_first:
            try:
                result = action()
            except Exception as problem:
                error = problem
        told = self.told(error)
        if told is not None:
            raise told if error is None else error
        return result

    def from_first(self, action: Callable[[], Result]) -> Result:
        """What the first process gets from `action`, told to all; see `on_first`."""
        return cast("Result", self.told(self.on_first(action)))

    def on_all(self, action: Callable[[], Result]) -> list[Result]:
        """What each process gets from `action`, in which there is no collective; by rank.

        Raises:
            Exception: What the first of those that failed raised, in every process.
        """
        if self.size == 1:
            return [action()]
        result: Result | None = None
        error: Exception | None = None
        try:
            result = action()
        except Exception as problem:
            error = problem
        outcomes = self.each((result, error))
        for rank, (_, told) in enumerate(outcomes):
            if told is not None:
                raise (error or told) if rank == self.rank else told
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def _reduced(self, tensor: Tensor, operation: str) -> Tensor:
        if self.size > 1:
            with _naming_the_cause():
                dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return tensor


ALONE = Ranks()
"""One process by itself."""

_known: tuple[Any, Ranks] = (None, ALONE)


def current() -> Ranks:
    """The processes of the default group of torch.distributed; `ALONE` where there is none.

    The first call in a group is a collective. A group that `process_group` did not make needs a
    backend for tensors of the processor too, such as "cpu:gloo,cuda:nccl".
    """
    global _known
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    if _known[0] is not dist.group.WORLD:
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        ranks = Ranks(rank=dist.get_rank(), size=dist.get_world_size(), patient=patient)
        _known = (dist.group.WORLD, ranks)
    return _known[1]


@contextmanager
def process_group(timeout_seconds: float = 300.0) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without it, or if that was done, do nothing.

    Tensors on a GPU travel by NCCL, those on the processor by gloo. A process gets a
    `PeerLostError` at once where a peer has died, and after `timeout_seconds` where one hangs.

    Yields:
        The processes, of which this is one.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield current()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    with _naming_the_cause():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    # Left as it is after an error, since to leave in good order would wait for the others.
    yield current()
    dist.destroy_process_group()


def processes_here() -> int:
    """How many processes share this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def _naming_the_cause() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(
            "Another process of this run has ended or hangs, and its own message says why. Begin "
            "all of them again; a run with an `out` goes on with resume=True. (torch.distributed: "
            f"{str(error).splitlines()[0]})"
        ) from error


def _unpacked(facts: Mapping[str, Any], flat: Tensor) -> dict[str, Tensor]:
    sizes = [_n_bytes(shape, dtype) for shape, dtype, _ in facts.values()]
    # Copies, since a view would have to begin at a multiple of its dtype's size.
    return {
        name: part.clone().view(dtype).view(shape)
        for (name, (shape, dtype, _)), part in zip(facts.items(), flat.split(sizes), strict=True)
    }


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _n_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
