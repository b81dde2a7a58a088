"""Counters go on past 2^31 tokens, and Adam past 2^24 steps, where its float32 stands still."""

from pathlib import Path

import pytest
import torch

import saefeat as sf
from saefeat.activations.sources import LeftOut
from saefeat.dictionaries.base import Origin
from saefeat.dictionaries.topk import TopK
from saefeat.kernels.codes import Codes
from saefeat.kernels.dispatch import choose_kernels
from saefeat.metrics.sparsity import SparsityCounts
from saefeat.superposition.diagnostics.co_activation import CoActivation
from saefeat.training.bank_learner import BankLearner
from saefeat.training.dead_latents import DeadLatents

EDGE = 2**31 - 1
"""The largest number of 32 bits."""
BATCH = 64


def codes() -> Codes:
    """Latent 0 is on in every row, and latent 1 in none."""
    latents = torch.zeros(BATCH, 1, dtype=torch.long)
    return Codes.from_rows(latents, torch.ones(BATCH, 1), 2)


def rows() -> torch.Tensor:
    return torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))


def test_firing_counts_and_density_go_on() -> None:
    counts = SparsityCounts(torch.ones(2))
    counts.n_rows, counts.firing[0], counts.activation_sums[0] = EDGE, EDGE, EDGE
    counts.update(codes())
    assert counts.n_rows == int(counts.firing[0]) == EDGE + BATCH
    assert float(counts.activation_sums[0]) == EDGE + BATCH
    assert (counts.l0, counts.n_alive) == (1.0, 1)


def test_a_latent_that_was_silent_for_so_long_is_dead_and_can_come_back() -> None:
    dead = DeadLatents(2, EDGE, torch.device("cpu"))
    dead.tokens_since_fired.fill_(EDGE - 1)
    dead.update(codes())
    assert dead.tokens_since_fired.tolist() == [0, EDGE - 1 + BATCH]
    assert dead.latents.tolist() == [1]


def test_pairs_that_are_on_together_are_counted_on() -> None:
    counts = CoActivation(2)
    counts.update(codes())
    counts.counts *= EDGE
    counts.update(codes())
    assert counts.counts[0, 0] == BATCH * (EDGE + 1)


def learner(n_tokens: int) -> BankLearner:
    dictionary = TopK(sf.TopKConfig(k=2), 6, 12, Origin(hook_name="a", seed=0))
    return BankLearner(
        {("a", 2, 0): dictionary},
        n_tokens=n_tokens,
        n_steps=n_tokens // BATCH,
        device=torch.device("cpu"),
        kernels=choose_kernels("auto", torch.device("cpu"))[1],
        selection_dtype=torch.float32,
    )


@pytest.mark.parametrize("n_before", [EDGE - 10, 2**40])
def test_a_run_goes_on_and_keeps_its_place(n_before: int) -> None:
    trains = learner(2**41)
    batch = {"a": rows()[:BATCH]}
    trains.step(batch)
    state = {name: one.clone() for name, one in trains.state().items()}
    n_steps = n_before // BATCH
    # As so many batches like the first would have left them.
    state["n_tokens_seen"] = torch.tensor(n_before)
    state["step_number"] = torch.tensor(n_steps)
    state["scale.a"] *= n_before / BATCH
    for name in state:
        if name.startswith("0.adam.step"):
            state[name].fill_(n_steps)
    trains = learner(2**41)
    trains.restore(state)
    factor = float(trains.scales["a"].factor)
    before = trains.state()["0.dictionary.W_dec"].clone()
    measured = trains.step(batch)
    assert trains.n_tokens_seen == n_before + BATCH
    assert trains.step_number == n_steps + 1
    assert float(trains.scales["a"].factor) == pytest.approx(factor, rel=1e-6)
    after = trains.state()
    assert int(after["n_tokens_seen"]) == n_before + BATCH
    assert not torch.equal(after["0.dictionary.W_dec"], before), "it has stopped to learn"
    assert all(torch.as_tensor(value).isfinite() for value in measured["a", 2, 0].values())
    assert trains.finish()["a", 2, 0].origin.n_tokens == n_before + BATCH


def test_a_stream_goes_on_in_the_epoch_that_it_would_be_in(tmp_path: Path) -> None:
    stream = sf.ActivationStream.from_tensors({"a": rows()}, batch_size=BATCH)
    sf.cache_activations(stream, tmp_path / "acts", progress=False)
    stored = sf.ActivationStream.from_store(tmp_path / "acts", batch_size=BATCH)
    n_rows = stored.n_rows
    left_out = {"positions_read": EDGE}
    epoch = EDGE // n_rows
    there = stored.batches(
        2**40, ({"kind": "random access", "start": epoch * n_rows, "left_out": left_out}, {})
    )
    found = torch.cat([next(there)["a"] for _ in range(n_rows // BATCH)])
    assert there.epoch == epoch
    assert there.left_out == LeftOut(positions_read=EDGE + len(found))
    wanted = stored._source.shuffled_rows(0, epoch, 0, len(found), LeftOut())["a"]  # type: ignore[attr-defined]
    assert torch.equal(found, wanted)

    buffered = stream.batches(2**40)
    next(buffered)
    facts, held = buffered.state()
    again = stream.batches(2**40, ({**facts, "n_given": EDGE, "n_left": 2**39}, held))
    assert torch.equal(next(again)["a"], next(buffered)["a"])
    assert again.state()[0]["n_given"] == EDGE + BATCH
