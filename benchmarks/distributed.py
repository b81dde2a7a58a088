"""What several processes send each other, against the least possible; and what many would do.

Bytes: a small language model with random weights feeds a bank, by each division of the work.
Bytes are counted, not timed: those of the collectives, those that the kernel saw on the loopback
interface, and those that arithmetic gives, which the model on paper uses too.

    torchrun --nproc-per-node 2 benchmarks/distributed.py bytes --out benchmarks/results/wire.csv

One row for each division and kind; bytes are received, by a process in a step:

- counted: payload of the collectives; of a sum over W processes 2 (W - 1) / W of its size, which
  a ring sends and less than which nothing can (Patarasuk and Yuan 2009).
- sums, activations: what `received` gives for these alone; counted has also firing, norms,
  moments, selection and agreement.
- loopback: what the kernel counted, whoever sent it, over the processes.
- least: by batches, the sum of all gradients, with every row used where it was read; by
  dictionaries, the rows of the hooks that a process trains and another process has read; by
  latents, the sum of what they decode to, and every row that another process has read.

Paper: seconds of a step on 8, 64 and 512 GPUs for a 70B model, and what binds.

    python benchmarks/distributed.py paper
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from machine import where, write_row

import saefeat as sf

N_LAYERS, WIDTH, N_ROWS = 4, 64, 512
STEPS = (8, 40)
"""Steps of the two runs whose difference is what a step takes."""
DIVIDED = ("data", "bank", "features")
CONFIGS = {"topk": sf.TopKConfig(k=8), "batch_topk": sf.BatchTopKConfig(k=8)}


@dataclass(frozen=True)
class Bytes:
    """Count bytes; see the module."""

    out: Path
    expansion_factor: int = 8


@dataclass(frozen=True)
class Paper:
    """Figures of the model on paper. A process has a language model of its own, on several GPUs,
    and trains on one of them; it is as large as the memory of GPUs makes it."""

    lm_parameters: float = 70e9
    """In bfloat16."""
    d_model: int = 8192
    n_hooks: int = 30
    expansion_factor: int = 8
    k: int = 64
    n_rows: int = 32_768
    """Tokens in a step."""
    gpus_for_lm: int = 4
    """GPUs of a process."""
    flops: float = 0.4 * 989e12
    """Of a GPU each second: H100, bfloat16 dense, at 40 %."""
    gpu_bytes: float = 80e9
    network: float = 50e9
    """Bytes each second into a GPU from another machine: 400 Gb/s."""


def summed_bytes(n_bytes: float, n_processes: int) -> float:
    """What a process receives while all get the sum of n_bytes of each."""
    return 2 * (n_processes - 1) / n_processes * n_bytes


def received(
    parallel: str,
    n_processes: int,
    *,
    n_parameters: float,
    n_rows: int,
    width: float,
    number_bytes: int,
) -> dict[str, float]:
    """Bytes that a process receives in a step for what is summed, and for activations.

    Args:
        parallel: What is divided.
        n_processes: W.
        n_parameters: Weights of the whole bank.
        n_rows: Rows of a batch.
        width: Of all hooks together, of which each has a dictionary.
        number_bytes: Of a number in the activations.
    """
    from_others = (n_processes - 1) / n_processes * n_rows * width * number_bytes
    if parallel == "bank":
        return {"sums": 0.0, "activations": from_others / n_processes}
    n_summed = n_parameters if parallel == "data" else n_rows * width
    return {"sums": summed_bytes(4 * n_summed, n_processes), "activations": from_others}


def on_paper(n_gpus: int, figures: Paper) -> dict[str, Any]:
    """Seconds of a step, and what binds, with the dictionaries divided among the processes."""
    f = figures
    n_processes = n_gpus // f.gpus_for_lm
    d_sae = f.expansion_factor * f.d_model
    weights = 2 * f.d_model * d_sae
    free = f.gpu_bytes - 2 * f.lm_parameters / f.gpus_for_lm
    most = int(free // (16 * weights))
    each = -(-f.n_hooks // n_processes)
    dense, sparse = 2 * f.n_rows * f.d_model * d_sae, 10 * f.n_rows * f.k * f.d_model
    sizes = {
        "n_parameters": f.n_hooks * weights,
        "n_rows": f.n_rows,
        "width": f.n_hooks * f.d_model,
        "number_bytes": 2,
    }
    wire = {
        parallel: sum(received(parallel, n_processes, **sizes).values()) / f.network
        for parallel in DIVIDED
    }
    seconds = {
        "language model": 2 * f.lm_parameters * f.n_rows / (n_gpus * f.flops),
        "dictionaries": min(each, most) * (dense + sparse) / f.flops,
        "wire": wire["bank"],
    }
    binds = max(seconds, key=lambda part: seconds[part])
    if each > most:
        binds = f"memory: {most} dictionaries fit beside the model, {most * n_processes} in all"
    elif n_processes > f.n_hooks:
        binds = f"too few dictionaries: {n_processes - f.n_hooks} processes have none"
    return {
        "GPUs": n_gpus,
        "processes": n_processes,
        "dictionaries each": each,
        **{name: f"{value:.3f}" for name, value in seconds.items()},
        "wire by batches": f"{wire['data']:.3f}",
        "wire by latents": f"{wire['features']:.3f}",
        "binds": binds,
    }


class Counter:
    """Bytes that this process receives in collectives, counted as they are called."""

    def __init__(self) -> None:
        self.n_bytes = 0.0
        plain = {name: getattr(dist, name) for name in ("all_reduce", "broadcast")}
        plain_batch, irecv = dist.batch_isend_irecv, dist.irecv
        plain_gather = dist.all_gather

        def all_reduce(tensor: torch.Tensor, *rest: Any) -> Any:
            self.n_bytes += summed_bytes(n_bytes_of(tensor), dist.get_world_size())
            return plain["all_reduce"](tensor, *rest)

        def broadcast(tensor: torch.Tensor, source: int, *rest: Any) -> Any:
            self.n_bytes += 0 if source == dist.get_rank() else n_bytes_of(tensor)
            return plain["broadcast"](tensor, source, *rest)

        def batch_isend_irecv(operations: list[Any]) -> Any:
            self.n_bytes += sum(n_bytes_of(one.tensor) for one in operations if one.op is irecv)
            return plain_batch(operations)

        def all_gather(received: list[torch.Tensor], tensor: torch.Tensor) -> Any:
            self.n_bytes += (len(received) - 1) * n_bytes_of(tensor)
            return plain_gather(received, tensor)

        dist.all_reduce, dist.broadcast, dist.all_gather = all_reduce, broadcast, all_gather
        dist.batch_isend_irecv = batch_isend_irecv


def n_bytes_of(tensor: torch.Tensor) -> int:
    """Of its numbers."""
    return tensor.numel() * tensor.element_size()


def loopback_bytes() -> int:
    """Received on the loopback interface since the machine began."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (line,) = [line for line in lines if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[0])


def stream() -> sf.ActivationStream:
    """Activations of a language model with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_lens

        config = transformer_lens.HookedTransformerConfig(
            n_layers=N_LAYERS,
            d_model=WIDTH,
            n_heads=4,
            d_head=WIDTH // 4,
            d_mlp=4 * WIDTH,
            d_vocab=500,
            n_ctx=32,
            act_fn="gelu",
            seed=0,
            device="cpu",
        )
        model = transformer_lens.HookedTransformer(config).eval()
    ids = torch.randint(500, (2000, 32), generator=torch.Generator().manual_seed(0))
    return sf.ActivationStream.from_model(
        model,
        sf.load_tokens(ids),
        "blocks.*.hook_resid_post",
        batch_size=N_ROWS,
        buffer_rows=2 * N_ROWS,
        contexts_per_forward=4,
        max_norm_ratio=None,
    )


def count(options: Bytes) -> None:
    """One row for each division and kind."""
    with sf.process_group() as ranks:
        counter = Counter()
        source = stream()
        for parallel in DIVIDED:
            for kind, config in CONFIGS.items():
                counted, seen = [], []
                for n_steps in STEPS:
                    ranks.each(None)  # so that all have ended what came before
                    before, before_seen = counter.n_bytes, loopback_bytes()
                    bank = sf.train(
                        source,
                        config,
                        expansion_factors=[options.expansion_factor],
                        n_tokens=n_steps * N_ROWS,
                        parallel=parallel,
                        progress=False,
                    )
                    counted.append(sum(ranks.each(counter.n_bytes - before)) / ranks.size)
                    seen.append((loopback_bytes() - before_seen) / ranks.size)
                n_parameters = sum(one.numel() for sae in bank.values() for one in sae.parameters())
                parts = received(
                    parallel,
                    ranks.size,
                    n_parameters=n_parameters,
                    n_rows=N_ROWS,
                    width=sum(source.widths.values()),
                    number_bytes=4,
                )
                least = parts["sums"] + (parts["activations"] if parallel != "data" else 0)
                a_step = [(long - short) / (STEPS[1] - STEPS[0]) for short, long in (counted, seen)]
                row = {
                    **where(torch.device("cpu")),
                    "processes": ranks.size,
                    "parallel": parallel,
                    "kind": kind,
                    "hooks": N_LAYERS,
                    "d_in": WIDTH,
                    "d_sae": options.expansion_factor * WIDTH,
                    "rows": N_ROWS,
                    "counted": round(a_step[0]),
                    **{name: round(value) for name, value in parts.items()},
                    "loopback": round(a_step[1]),
                    "least": round(least),
                    "over_least": f"{a_step[0] / least:.3f}",
                }
                if ranks.is_first:
                    write_row(options.out, row)


def main(options: Bytes | Paper) -> None:
    """Count, or work out."""
    if isinstance(options, Bytes):
        count(options)
        return
    rows = [on_paper(n_gpus, options) for n_gpus in (8, 64, 512)]
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({"bytes": Bytes, "paper": Paper}))
