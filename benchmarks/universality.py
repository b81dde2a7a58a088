"""What correlating and matching the latents of two dictionaries costs: time and peak memory.

Codes are synthetic, `k` latents on for each token, as frequent as 1 / rank: the second
dictionary is the first in another order, of whose entries `shared` are kept and the others drawn
again. They are what `sf.universality` keeps of two models; encoding them is not part of this.

    python benchmarks/universality.py --out benchmarks/results/universality.csv

One row for each number of latents, measured in a process of its own:

- centre_s, correlate_s, assign_s: seconds to centre both codes, to find all pairs with a
  correlation of at least `least`, and to assign them one to one.
- pairs, largest: such pairs, and latents of the larger side of the largest component of them.
- assigned, right: pairs that were made, and the share of them that is a latent and its copy.
- auction_s, auction_lost, auction_bound: the same pairs assigned by the auction that takes over
  from the exact method beyond 16,384 latents a component: seconds, the share of the exact
  sum that it lost (empty where nothing exact was made), and the share that it said it might have.
- resample_s: the mean correlation over 1,000 resamples of the contexts, which are of 128 tokens.
- tokens_s: correlating with the means for each token taken off, for `kinds` kinds of token.
- peak_mib: peak resident memory over what it was before the codes were made, up to assign_s;
  codes_mib: what the codes take; table_mib: what a table of all pairs in float32 would.
- dense_s: the same correlations by dense products, in float32: one batch of 4,096 tokens, times
  the number of batches; empty where the table is beyond 1 GiB.

Needs Linux, for the peak of a process that another one started.
"""

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import tyro
from machine import seconds_of, where, write_row
from scaling import peak_bytes
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from saefeat.superposition.assignment import EXACT_UP_TO, Assignment, assign_pairs
from saefeat.superposition.universality.correlation import (
    CorrelatedPairs,
    Correlations,
    correlated_pairs,
)
from saefeat.superposition.universality.latent_rows import Centred, centred
from saefeat.superposition.universality.score import context_blocks, draw_weights, resample

DEVICE = torch.device("cpu")
BATCH_ROWS = 4096
DENSE_BYTES = 1 << 30
"""Largest table of all pairs that dense products are timed with."""


@dataclass
class Options:
    out: Path = Path("universality.csv")
    widths: tuple[int, ...] = (4096, 16_384, 65_536)
    """Latents of each of the two dictionaries."""
    n_tokens: int = 1_000_000
    k: int = 32
    """Latents on for a token."""
    shared: float = 0.7
    least: float = 0.1
    """Correlation from which a pair is assigned."""
    kinds: int = 20_000
    """Kinds of token; 0 leaves tokens_s out."""


def main(options: Options) -> None:
    spawn = multiprocessing.get_context("spawn")
    for width in options.widths:
        connection, other = spawn.Pipe()
        arguments = (other, options, width, torch.get_num_threads())
        process = spawn.Process(target=serve, args=arguments, daemon=True)
        process.start()
        other.close()
        measured: dict[str, object] = connection.recv()
        process.join()
        facts = {"n_tokens": options.n_tokens, "d_sae": width, "k": options.k}
        more = {"shared": options.shared, "least": options.least}
        write_row(options.out, {**where(DEVICE), **facts, **more, **measured})


def serve(connection: Connection, options: Options, width: int, n_threads: int) -> None:
    """What the process of one size does."""
    torch.set_num_threads(n_threads)
    # Compiling is no part of it.
    small = [centred(one, least_firing=1) for one in made_codes(500, 64, 4, 0.7, seed=1)[:2]]
    first = correlated_pairs(*small, least=0.01)
    assign(first, 64, exact_up_to=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = peak_bytes()
    *codes, copies = made_codes(options.n_tokens, width, options.k, options.shared, seed=0)
    ready: list[Centred] = []
    found: list[CorrelatedPairs] = []
    made: list[Assignment] = []
    row: dict[str, object] = {}

    def timed(name: str, run: object) -> None:
        row[name] = f"{seconds_of(run, DEVICE):.2f}"  # type: ignore[arg-type]

    timed("centre_s", lambda: ready.extend(centred(one, least_firing=10) for one in codes))
    timed("correlate_s", lambda: found.append(correlated_pairs(*ready, least=options.least)))
    timed("assign_s", lambda: made.append(assign(found[0], width, exact_up_to=EXACT_UP_TO)))
    row["peak_mib"] = round((peak_bytes() - before) / 2**20)
    row["codes_mib"] = round(sum(one.data.nbytes + one.indices.nbytes for one in codes) / 2**20)
    row["table_mib"] = round(4 * width**2 / 2**20)
    row["pairs"] = len(found[0].left)
    row["largest"] = largest_side(found[0], width)
    row["assigned"] = len(made[0].rows)
    is_copy = copies[made[0].rows.numpy()] == made[0].columns.numpy()
    row["right"] = f"{is_copy.mean():.3f}"
    timed("auction_s", lambda: made.append(assign(found[0], width, exact_up_to=1)))
    exact, near = (float(one.weights.sum()) for one in made)
    row["auction_lost"] = f"{(exact - near) / exact:.2e}" if made[0].is_exact else ""
    row["auction_bound"] = f"{made[1].loss / near:.2e}"
    together = Correlations(
        pairs=made[0],
        largest_a=found[0].largest_a,
        largest_b=found[0].largest_b,
        n_counted=(ready[0].n_counted, ready[1].n_counted),
    )
    blocks = context_blocks(np.arange(options.n_tokens) // 128)
    weights = draw_weights(int(blocks.max()) + 1, 1000, 0)
    timed("resample_s", lambda: resample(together, *codes, blocks, weights))
    row["tokens_s"] = ""
    if options.kinds:
        ready.clear()
        tokens = token_kinds(options.n_tokens, options.kinds)

        def by_tokens() -> None:
            both = [centred(one, least_firing=10, tokens=tokens) for one in codes]
            correlated_pairs(*both, least=options.least)

        timed("tokens_s", by_tokens)
    row["dense_s"] = ""
    if 4 * width**2 <= DENSE_BYTES:
        dense = [torch.from_numpy(one[:BATCH_ROWS].toarray()) for one in codes]
        table = torch.zeros(width, width)
        table.addmm_(dense[0].T, dense[1])
        seconds = seconds_of(lambda: table.addmm_(dense[0].T, dense[1]), DEVICE)
        row["dense_s"] = f"{seconds * options.n_tokens / len(dense[0]):.1f}"
    connection.send(row)


def assign(pairs: CorrelatedPairs, width: int, exact_up_to: int) -> Assignment:
    return assign_pairs(
        pairs.left, pairs.right, pairs.correlations, width, width, exact_up_to=exact_up_to
    )


def largest_side(pairs: CorrelatedPairs, width: int) -> int:
    ends = pairs.left.numpy(), pairs.right.numpy() + width
    graph = coo_array((np.ones(len(ends[0])), ends), (2 * width, 2 * width))
    _, component = connected_components(graph, directed=False)
    return int(max(np.bincount(side).max() for side in (component[:width], component[width:])))


def made_codes(
    n: int, width: int, k: int, shared: float, *, seed: int
) -> tuple[csr_array, csr_array, np.ndarray]:
    """Codes of both dictionaries, and of each latent of the first its copy in the second."""
    generator = np.random.default_rng(seed)
    copies = generator.permutation(width).astype(np.int32)
    names = generator.permutation(width).astype(np.int32)

    def drawn() -> np.ndarray:
        # Of density 1 / rank: a rank below r is as likely as log r.
        ranks = width ** generator.random((n, k), dtype=np.float32)
        return names[np.minimum(ranks.astype(np.int32), width) - 1]

    def codes(latents: np.ndarray, values: np.ndarray) -> csr_array:
        # A latent that was drawn twice for a token is on once, twice as strongly.
        offsets = np.arange(0, n * k + 1, k, dtype=np.int32)
        made = csr_array((values.ravel(), latents.ravel(), offsets), shape=(n, width))
        made.sum_duplicates()
        return made

    latents, values = drawn(), 0.5 + generator.random((n, k), dtype=np.float32)
    kept = generator.random((n, k), dtype=np.float32) < shared
    others = np.where(kept, copies[latents], drawn())
    return codes(latents, values), codes(others, values.copy()), copies


def token_kinds(n: int, kinds: int) -> np.ndarray:
    """Kinds of token as frequent as 1 / rank."""
    return (kinds ** np.random.default_rng(2).random(n)).astype(np.int64)


if __name__ == "__main__":
    main(tyro.cli(Options))
