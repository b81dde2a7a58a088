"""Latents divided among processes: plain collectives, or DTensor over a DeviceMesh?

Forward and backward of one training step of a TopK dictionary whose encoder, biases of the latents
and decoder are divided by latent; every process has the whole batch. All start from one
dictionary, select in float32, end with the gradients that an optimizer of each part needs, and
have to give one loss and the same gradients, or the script stops.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/device_mesh.py \\
        --out benchmarks/results/device_mesh.csv

- collectives: the step that `parallel="features"` makes: k candidates of each process are
  gathered, decoding is summed, and the arithmetic is sparse.
- collectives-by-dtensor: the same, but what travels does so as a DTensor that is redistributed,
  from Shard to Replicate for the candidates and from Partial to Replicate for the sums. Over the
  first, this is what DTensor itself costs.
- dtensor: parameters are DTensors and the step is stock operators on them, as one would write it
  for a single device. DTensor's topk along the sharded dimension redistributes the scores of all
  latents first, from Shard(1) to Shard(0): an all-to-all, in place of which gloo gathers them all.
  What is selected is a mask on dense codes, since DTensor has no sparse products.
- dtensor-candidates: the same, but topk of the local scores comes first, and only the k
  candidates of each process are a DTensor that topk redistributes.

One row for each shape and way:

- ms: median over the rounds, in the first process; a step ends when every process has ended it.
- over_collectives: median over the rounds of its time over that of collectives in the round.
- loopback_kilobytes: received by a process in a step, as the kernel counted on the loopback
  interface: with headers, and whatever else the machine sent itself meanwhile.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from distributed import loopback_bytes
from machine import in_turn, ratio, where, write_row
from rows import structured_batches
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

import saefeat as sf
from saefeat.core.distributed import Ranks
from saefeat.dictionaries.step import StepContext
from saefeat.dictionaries.topk import TopK
from saefeat.kernels.dispatch import choose_kernels
from saefeat.kernels.shared_latents import SummedProducts
from saefeat.training.sharded_features import shard_of

COUNTED_STEPS = 3
"""Steps over which bytes are counted."""
CPU = torch.device("cpu")

Way = Callable[[int], Tensor]
"""One forward and backward of the batch of that number; gives the loss."""


@dataclass
class Options:
    out: Path = Path("device_mesh.csv")
    shapes: tuple[tuple[int, int, int, int], ...] = (
        (512, 64, 1024, 8),
        (4096, 576, 4608, 32),
        (2048, 768, 24576, 64),
    )
    """Batch size, d_in, d_sae and k of each: four numbers after four, one --shapes for all."""
    rounds: int = 9
    warm_up: int = 2
    """Rounds before those that count."""
    batches: int = 4
    """Different batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RanksByDTensor(Ranks):
    """Processes whose tensors travel as DTensors; those operations alone that the step has."""

    mesh: DeviceMesh

    def sum(self, tensor: Tensor) -> Tensor:
        return self._whole(tensor, Partial())

    def stacked(self, tensor: Tensor) -> Tensor:
        return self._whole(tensor[None], Shard(0))

    def _whole(self, tensor: Tensor, placement: Placement) -> Tensor:
        return DTensor.from_local(tensor, self.mesh, [placement], run_check=False).full_tensor()


class Collectives:
    """The step of this library, on one process's part of a dictionary."""

    def __init__(self, whole: TopK, batches: list[Tensor], ranks: Ranks) -> None:
        self.batches, self.ranks = batches, ranks
        self.kernels = SummedProducts(choose_kernels("auto", CPU)[1], ranks)
        self.part = shard_of(whole, ranks)
        for parameter in self.part.parameters():
            parameter.grad = torch.zeros_like(parameter)  # as a `Learner` keeps it

    def __call__(self, step: int) -> Tensor:
        self.part.zero_grad(set_to_none=False)
        x = self.batches[step % len(self.batches)]
        context = StepContext(
            kernels=self.kernels,
            progress=1.0,
            variance=variance_of(x),
            dead=torch.empty(0, dtype=torch.long),
            feature_ranks=self.ranks,
            n_dead=0,
        )
        loss: Tensor = self.part.training_loss(x, x, context).total
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        return {name: x.grad for name, x in self.part.named_parameters() if x.grad is not None}


class OnDTensors:
    """The step in stock operators, on parameters that are DTensors."""

    def __init__(
        self, whole: TopK, batches: list[Tensor], mesh: DeviceMesh, *, candidates_first: bool
    ) -> None:
        self.k, self.mesh, self.candidates_first = whole.config.k, mesh, candidates_first
        self.batches = [DTensor.from_local(x, mesh, [Replicate()]) for x in batches]
        self.parameters = {
            name: distribute_tensor(
                x.detach(), mesh, [Replicate() if name == "b_dec" else Shard(0)]
            ).requires_grad_()
            for name, x in whole.named_parameters()
        }
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, step: int) -> Tensor:
        encoder, b_enc, decoder, b_dec = (
            self.parameters[name] for name in ("encoder", "b_enc", "W_dec", "b_dec")
        )
        for parameter in self.parameters.values():
            parameter.grad.zero_()
        x = self.batches[step % len(self.batches)]
        scores = torch.addmm(b_enc, x - b_dec, encoder.T)  # Shard(1)
        floor = self.candidates(scores.detach()).topk(self.k, dim=1).values[:, -1:]
        codes = torch.where(scores >= floor, torch.relu(scores), 0.0)
        decoded = (codes @ decoder).redistribute(placements=[Replicate()])  # from Partial
        loss = (x - b_dec - decoded).square().sum() / variance_of(x.to_local())
        loss.backward()
        return loss.detach().to_local()

    def candidates(self, scores: DTensor) -> DTensor:
        """Scores that hold the k largest of each row, divided by column."""
        if not self.candidates_first:
            return scores
        own = scores.to_local().topk(self.k, dim=1, sorted=False).values
        return DTensor.from_local(own, self.mesh, [Shard(1)], run_check=False)

    def gradients(self) -> dict[str, Tensor]:
        return {name: x.grad.to_local() for name, x in self.parameters.items()}


def variance_of(x: Tensor) -> Tensor:
    """What a loss is a share of; see `StepContext`."""
    return torch.linalg.vector_norm(x - x.mean(0)).square()


def check_equal(ways: dict[str, Collectives | OnDTensors]) -> None:
    """Stop unless all give the loss and the gradients of the first, to float32's accuracy."""
    losses = {name: way(0) for name, way in ways.items()}
    first, *others = ways
    for name in others:
        torch.testing.assert_close(losses[name], losses[first], rtol=1e-4, atol=0)
        found = ways[name].gradients()
        for parameter, expected in ways[first].gradients().items():
            error = (found[parameter] - expected).norm() / expected.norm()
            if not error < 1e-3:
                raise ValueError(
                    f"The gradient of {parameter} by {name} is off by {error:.1e} of that by "
                    f"{first}: they do not do the same, so that their times compare nothing."
                )


def received(way: Way, ranks: Ranks) -> float:
    """Bytes that a process receives in a step."""
    dist.barrier()
    before = loopback_bytes()
    for step in range(COUNTED_STEPS):
        way(step)
    dist.barrier()
    return (loopback_bytes() - before) / COUNTED_STEPS / ranks.size


def ended_by_all(way: Way) -> Way:
    """The step until every process has ended it, so that none waits in the next one's time."""

    def run(step: int) -> Tensor:
        loss = way(step)
        dist.barrier()
        return loss

    return run


def compare(shape: tuple[int, int, int, int], options: Options, ranks: Ranks) -> None:
    """Measure all ways at one shape, and write their rows."""
    batch_size, d_in, d_sae, k = shape
    batches = structured_batches(options.batches, batch_size, d_in)
    whole = TopK(sf.TopKConfig(k=k), d_in, d_sae)
    generator = torch.Generator().manual_seed(0)
    whole.initialise(generator, batches[0].mean(0), batches[0], batches[0])
    mesh = init_device_mesh("cpu", (ranks.size,))
    by_dtensor = RanksByDTensor(rank=ranks.rank, size=ranks.size, patient=ranks.patient, mesh=mesh)
    ways: dict[str, Collectives | OnDTensors] = {
        "collectives": Collectives(whole, batches, ranks),
        "collectives-by-dtensor": Collectives(whole, batches, by_dtensor),
        "dtensor": OnDTensors(whole, batches, mesh, candidates_first=False),
        "dtensor-candidates": OnDTensors(whole, batches, mesh, candidates_first=True),
    }
    check_equal(ways)
    seconds = in_turn(
        {name: ended_by_all(way) for name, way in ways.items()},
        rounds=options.rounds,
        warm_up=options.warm_up,
        device=CPU,
    )
    for name, way in ways.items():
        n_bytes = received(way, ranks)
        row = {
            **where(CPU),
            "processes": ranks.size,
            "batch": batch_size,
            "d_in": d_in,
            "d_sae": d_sae,
            "k": k,
            "rounds": options.rounds,
            "way": name,
            "ms": f"{1e3 * statistics.median(seconds[name]):.1f}",
            "over_collectives": f"{ratio(seconds[name], seconds['collectives']):.3f}",
            "loopback_kilobytes": round(n_bytes / 1e3),
        }
        if ranks.is_first:
            write_row(options.out, row)


def main(options: Options) -> None:
    with sf.process_group() as ranks:
        for shape in options.shapes:
            compare(shape, options, ranks)


if __name__ == "__main__":
    main(tyro.cli(Options))
