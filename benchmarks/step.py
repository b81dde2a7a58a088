"""What a training step costs, against the peers and against the one product that it cannot avoid.

Every contestant makes one training step on the same batch in turn, `contestants.py` says of
what, and in the same rounds the bare encoder product of that shape is timed in float32 and in
bfloat16, into an output that is there already. For matching pursuit, encoding alone is timed too,
T = 32 picks at every shape.

    pip install -e ".[bench]"
    pip install --no-deps --target peers dictionary-learning==0.1.0 eai-sparsify==1.3.3 \\
        natsort schedulefree
    PYTHONPATH=peers python benchmarks/step.py --out benchmarks/results/step.csv

Written against sae-lens 6.54.12, dictionary-learning 0.1.0 and eai-sparsify 1.3.3. One that
is not installed is reported as such. dictionary-learning works without nnsight, which only its
buffer of activations needs.

One row for each shape, kind and contestant:

- version: of the contestant's package.
- ms: median over the rounds.
- over_saefeat: median over the rounds of the contestant's time over our step's in that round, of
  an encode over our encode's: how many times as fast we are.
- over_float32_product, over_bfloat16_product: the same over the encoder product.
- saefeat_l0: latents on per token in our last step, on which our time depends. The kinds with a
  penalty start at k here, where training ends, unless --initial-l0 says otherwise.

All contestants of a kind are in memory at once. SAELens's matching pursuit makes 32 encoder
products a step, in float32: at the largest shape that is most of the script's time, and
--kinds with fewer --rounds is the way to measure it apart.
"""

import gc
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from contestants import INSTALL, PACKAGES, Saefeat, Step, Task, contestant, version
from kinds import CONFIGS, sae_lens_dictionary
from machine import in_turn, ratio, where, write_row
from rows import structured_batches

PICKS = 32
"""Atoms that matching pursuit picks per token."""
PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Options:
    out: Path = Path("step.csv")
    shapes: tuple[tuple[int, int, int, int], ...] = (
        (4096, 576, 4608, 32),
        (2048, 768, 24576, 64),
        (4096, 2304, 16384, 64),
    )
    """Batch size, d_in, d_sae and k of each: four numbers after four, one --shapes for all."""
    kinds: tuple[str, ...] = tuple(CONFIGS)
    peers: tuple[str, ...] = tuple(name for name in PACKAGES if name != "saefeat")
    """Those to measure."""
    rounds: int = 7
    warm_up: int = 2
    """Rounds before those that count."""
    batches: int = 4
    """Different batches."""
    initial_l0: float | None = None
    """L0 that the kinds with a penalty start from here; None is k."""


def main(options: Options) -> None:
    for batch_size, d_in, d_sae, k in options.shapes:
        batches = structured_batches(options.batches, batch_size, d_in)
        for kind in options.kinds:
            task = Task(
                kind=kind,
                batches=batches,
                d_sae=d_sae,
                k=PICKS if kind == "matching_pursuit" else k,
                initial_l0=options.initial_l0,
            )
            compare(task, options)
            # The trainers hold themselves in cycles: gigabytes, beside those of the next kind.
            gc.collect()


def compare(task: Task, options: Options) -> None:
    """Measure one kind at one shape and write its rows."""
    device = torch.device("cpu")
    ours = Saefeat(task)
    ways: dict[str, Step] = {"saefeat": ours}
    missing = []
    for peer in options.peers:
        try:
            step = contestant(peer, task)
        except ModuleNotFoundError as error:
            missing.append(peer)
            print(f"{error} To have it: {INSTALL}")
            continue
        if step is not None:
            ways[peer] = step
    if task.kind == "matching_pursuit":
        ways |= encodes(task, with_sae_lens="sae-lens" in ways)
    products = {f"product-{name}": product(task, dtype) for name, dtype in PRODUCTS.items()}
    seconds = in_turn(
        ways | products, rounds=options.rounds, warm_up=options.warm_up, device=device
    )
    shape = {
        **where(device),
        "kind": task.kind,
        "batch": task.batch_size,
        "d_in": task.d_in,
        "d_sae": task.d_sae,
        "k": task.k,
        "rounds": options.rounds,
    }
    for name in [*seconds, *missing]:
        columns = measured(name, seconds)
        write_row(options.out, {**shape, **columns, "saefeat_l0": f"{ours.l0:.1f}"})


def measured(name: str, seconds: dict[str, list[float]]) -> dict[str, str]:
    """The columns of one contestant."""
    package = name.removesuffix("-encode")
    columns = {"contestant": name}
    if name not in seconds:
        return {
            **columns,
            "version": "not installed",
            "ms": "",
            "over_saefeat": "",
            **{f"over_{product}_product": "" for product in PRODUCTS},
        }
    reference = "saefeat-encode" if name.endswith("-encode") else "saefeat"
    return {
        **columns,
        "version": version(package) if package in PACKAGES else torch.__version__,
        "ms": f"{1e3 * statistics.median(seconds[name]):.2f}",
        "over_saefeat": f"{ratio(seconds[name], seconds[reference]):.3f}",
        **{
            f"over_{product}_product": f"{ratio(seconds[name], seconds[f'product-{product}']):.3f}"
            for product in PRODUCTS
        },
    }


def product(task: Task, dtype: torch.dtype) -> Step:
    """The encoder product of `task` alone."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(task.d_sae, task.d_in, generator=generator).to(dtype)
    bias = torch.zeros(task.d_sae, dtype=dtype)
    batches = [batch.to(dtype) for batch in task.batches]
    out = torch.empty(task.batch_size, task.d_sae, dtype=dtype)
    return lambda step: torch.addmm(bias, batches[step % len(batches)], weight.T, out=out)


def encodes(task: Task, *, with_sae_lens: bool) -> dict[str, Step]:
    """Matching pursuit of the batch by dictionaries that stay as they are."""
    learner = Saefeat(task)
    learner(0)
    dictionary = learner.learner.finish()["x", 1, 0]
    ways: dict[str, Step] = {"saefeat-encode": lambda step: dictionary.encode(task.batch(step))}
    if with_sae_lens:
        sae = sae_lens_dictionary("matching_pursuit", task.d_in, task.d_sae, task.k)

        @torch.no_grad()
        def encode(step: int) -> None:
            sae.encode(task.batch(step))

        ways["sae-lens-encode"] = encode
    return ways


if __name__ == "__main__":
    main(tyro.cli(Options))
