"""Synthetic activations: their law is what was asked for, and every row can be had again."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

import saefeat as sf
from saefeat.activations.sources import LeftOut, Progress
from saefeat.activations.synthetic_source import BLOCK_ROWS, EPOCH_ROWS
from saefeat.kernels.codes import Codes

N_ROWS = 50_000
LAWS = {
    "constant": {},
    "zipf": {"density_distribution": "zipf"},
    "log_uniform": {"density_distribution": "log_uniform", "density_ratio": 30.0},
    "given": {"density": torch.tensor([1.0, 0.9, 0.5, 0.2, 0.01, 0.001] + [0.05] * 34)},
    "correlated": {"density_distribution": "zipf", "correlation": 0.6},
    "hierarchical": {"density_distribution": "zipf", "zipf_exponent": 1.0, "hierarchy": 0.4},
    "both, and pairs": {
        "density_distribution": "zipf",
        "zipf_exponent": 1.0,
        "correlation": 0.5,
        "hierarchy": 0.4,
        "n_pairs": 3,
    },
}


def make(**options: Any) -> sf.SyntheticActivations:
    return sf.SyntheticActivations(
        **{"n_features": 40, "d_in": 16, "density": 0.05, "seed": 3, **options}
    )


def firing(truth: sf.SyntheticActivations, n_rows: int = N_ROWS) -> torch.Tensor:
    """Whether each feature is on in each row, in float64."""
    return (truth.sample(n_rows)[1].to_dense() > 0).double()


def within(counts: torch.Tensor, expected: torch.Tensor, n: int) -> bool:
    """Whether counts out of n are within 5.5 binomial deviations, and one, of n * expected.

    One, since a count of which few are expected is far from normal, and may be a whole one off.
    """
    slack = 5.5 * (n * expected * (1 - expected).abs()).sqrt() + 1
    return bool(((counts - n * expected).abs() <= slack).all())


# The law.


@pytest.mark.parametrize("law", LAWS)
def test_every_feature_is_on_as_often_as_was_asked(law: str) -> None:
    truth = make(**LAWS[law])
    codes = truth.sample(N_ROWS)[1]
    n_on = codes.firing_counts().double()
    assert torch.equal(n_on, (codes.to_dense() > 0).double().sum(0)), "an entry is there twice"
    assert within(n_on, truth.densities, N_ROWS)
    assert not within(n_on, truth.densities * 1.2, N_ROWS), "the test would miss 20 %"
    assert truth.l0 == pytest.approx(float(truth.densities.sum()))


@pytest.mark.parametrize("law", ["constant", "zipf", "log_uniform"])
def test_the_mean_density_is_what_was_asked(law: str) -> None:
    densities = make(density_distribution=law, density_ratio=50.0).densities
    assert float(densities.mean()) == pytest.approx(0.05, rel=1e-12)
    assert (densities.diff() <= 0).all()
    expected = {
        "constant": torch.ones(40).double(),
        "zipf": torch.arange(1, 41).double() ** -0.7,
        "log_uniform": torch.logspace(0, -math.log10(50), 40).double(),
    }[law]
    torch.testing.assert_close(densities / densities[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("law", ["constant", "given", "zipf"])
def test_features_are_independent_unless_told_otherwise(law: str) -> None:
    truth = make(**LAWS[law])
    on = firing(truth)
    both, p = on.T @ on, truth.densities
    expected = p[:, None] * p
    apart = ~torch.eye(40, dtype=torch.bool)
    assert within(both[apart], expected[apart], N_ROWS)
    # Nor does a row depend on the one before it.
    neighbours = on[1:].T @ on[:-1]
    assert within(neighbours, expected, N_ROWS - 1)


def test_the_number_on_in_a_row_is_binomial() -> None:
    """Of 40 independent features of density 0.05: mean 2, variance 1.9."""
    counts = firing(make()).sum(1)
    assert float(counts.var()) == pytest.approx(1.9, rel=0.05)
    none = float((counts == 0).double().mean())
    assert none == pytest.approx(0.95**40, abs=5 * math.sqrt(0.13 * 0.87 / N_ROWS))


def test_correlated_features_are_on_together_as_the_normal_orthant_says() -> None:
    rho = 0.6
    truth = make(**{**LAWS["correlated"], "correlation_block_size": 5})
    assert torch.bincount(truth.blocks).tolist() == [5] * 8
    assert not torch.equal(truth.blocks, truth.blocks.sort().values), "blocks mix densities"
    n = 4 * N_ROWS
    on = firing(truth, n)
    both, p = (on.T @ on).numpy(), truth.densities.numpy()
    thresholds = norm.isf(p)
    same = truth.blocks[:, None] == truth.blocks
    for i in range(40):
        for j in range(i):
            expected = p[i] * p[j]
            if same[i, j]:
                expected = multivariate_normal.cdf(
                    [-thresholds[i], -thresholds[j]], cov=[[1, rho], [rho, 1]]
                )
                assert expected > 2 * p[i] * p[j]
            slack = 5 * math.sqrt(n * expected) + 2
            assert abs(both[i, j] - n * expected) < slack, (i, j)


def test_a_child_is_on_only_with_its_parent_and_as_often_as_densities_say() -> None:
    truth = make(**LAWS["hierarchical"])
    children = (truth.parents >= 0).nonzero().squeeze(1)
    parents = truth.parents[children]
    assert len(children) == 16
    assert (truth.parents[parents] == -1).all()
    assert (truth.densities[parents] >= 2 * truth.densities[children]).all()
    assert len(set(parents.tolist())) > 3
    on = firing(truth)
    assert (on[:, children] <= on[:, parents]).all()
    assert float(on[:, children].sum()) > 1000
    # Two children of one parent are independent where it is on.
    first, second = next(
        (a, b)
        for a in children.tolist()
        for b in children.tolist()
        if a < b and truth.parents[a] == truth.parents[b]
    )
    p, parent = truth.densities, truth.densities[truth.parents[first]]
    expected = p[first] * p[second] / parent
    assert within((on[:, first] * on[:, second]).sum(), expected, N_ROWS)


@pytest.mark.parametrize("options", [{}, {"correlation": 0.5}, {"hierarchy": 0.5}])
def test_all_features_may_be_in_pairs(options: dict[str, float]) -> None:
    truth = make(n_features=4, n_pairs=2, pair_density=0.3, **options)
    assert truth.densities.tolist() == [0.3] * 4
    assert within(firing(truth).sum(dim=0), truth.densities, N_ROWS)


def test_pairs_are_the_last_features_and_independent() -> None:
    truth = make(n_pairs=2, pair_density=0.3, correlation=0.5)
    assert truth.pairs.tolist() == [[36, 37], [38, 39]]
    assert truth.densities[36:].tolist() == [0.3] * 4
    assert float(truth.densities[:36].mean()) == pytest.approx(0.05)
    assert (truth.blocks[36:] == -1).all()
    on = firing(truth)
    for a, b in truth.pairs.tolist():
        assert within((on[:, a] * on[:, b]).sum(), torch.tensor(0.09), N_ROWS)


@pytest.mark.parametrize(
    ("magnitude", "variance"),
    [
        ("constant", 0.0),
        ("uniform", 1 / 12),
        ("half_normal", math.pi / 2 - 1),
        ("log_normal", math.exp(0.25) - 1),
    ],
)
def test_magnitudes_are_positive_of_mean_1_and_of_their_law(
    magnitude: Any, variance: float
) -> None:
    values = make(magnitude=magnitude).sample(N_ROWS)[1].values.double()
    assert (values > 0).all()
    assert float(values.mean()) == pytest.approx(1, abs=5 * math.sqrt(variance / len(values)))
    assert float(values.var()) == pytest.approx(variance, rel=0.1)


def test_rows_are_the_features_that_are_on_and_noise_of_the_deviation_asked() -> None:
    x, codes = make().sample(N_ROWS)
    truth = make(noise=0.3)
    noisy, same_codes = truth.sample(N_ROWS)
    assert torch.equal(codes.to_dense(), same_codes.to_dense())
    torch.testing.assert_close(x, codes.to_dense() @ truth.directions)
    noise = (noisy - x).double()
    n = noise.numel()
    assert float(noise.mean()) == pytest.approx(0, abs=5 * 0.3 / math.sqrt(n))
    assert float(noise.var()) == pytest.approx(0.09, rel=5 * math.sqrt(2 / n))
    assert float((noise.T @ noise / N_ROWS).fill_diagonal_(0).abs().max()) < 0.09 * 5 / 200


def test_directions_are_unit_vectors_at_random() -> None:
    directions = make(n_features=2000, d_in=64).directions
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(2000))
    cosines = (directions @ directions.T)[~torch.eye(2000, dtype=torch.bool)]
    assert float(cosines.mean()) == pytest.approx(0, abs=1e-3)
    assert float(cosines.var()) == pytest.approx(1 / 64, rel=0.01)


def test_given_directions_are_used() -> None:
    truth = make(n_features=6, d_in=6, directions=torch.eye(6))
    x, codes = truth.sample(100)
    assert torch.equal(x, codes.to_dense())


@pytest.mark.parametrize("law", ["constant", "zipf", "log_uniform", "correlated"])
def test_the_law_is_that_of_sae_lens_for_equal_options(law: str) -> None:
    """Densities, how many are on together, and the first two moments of the rows."""
    synthetic = pytest.importorskip("sae_lens.synthetic")
    truth = make(**LAWS[law], magnitude="constant")
    matrix = None
    if law == "correlated":
        matrix = truth.correlation * (truth.blocks[:, None] == truth.blocks).float()
        matrix.fill_diagonal_(1.0)

    def use_ours(dictionary: Any) -> None:
        dictionary.feature_vectors.data = truth.directions.clone()

    peer = synthetic.ActivationGenerator(
        40, truth.densities.float(), correlation_matrix=matrix, mean_firing_magnitudes=1.0
    )
    dictionary = synthetic.FeatureDictionary(40, 16, initializer=use_ours)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        peer_codes = peer.sample(N_ROWS)
        peer_x = dictionary(peer_codes)
    x, codes = truth.sample(N_ROWS)
    assert within((peer_codes > 0).double().sum(0), truth.densities, N_ROWS)
    on, peer_on = (one.double() for one in (codes.to_dense(), peer_codes))
    together, peer_together = on.T @ on, peer_on.T @ peer_on
    slack = 5.5 * (together + peer_together).sqrt() + 2
    assert ((together - peer_together).abs() < slack).all()
    assert float(sf.metrics.l0(codes)) == pytest.approx(float(peer_on.sum(1).mean()), rel=0.02)
    assert float(on.sum(1).var()) == pytest.approx(float(peer_on.sum(1).var()), rel=0.05)
    scale = float(x.square().mean())
    assert float((x.mean(0) - peer_x.mean(0)).abs().max()) < 6 * math.sqrt(2 * scale / N_ROWS)
    difference = (x.T @ x - peer_x.T @ peer_x) / N_ROWS
    assert float(difference.abs().max()) < 0.05 * scale


# Rows by number.


def rows(batches: Any, hook_name: str = "synthetic") -> torch.Tensor:
    return torch.cat([batch[hook_name] for batch in batches])


@pytest.mark.parametrize("law", LAWS)
def test_rows_do_not_depend_on_the_size_of_batches(law: str) -> None:
    truth = make(**LAWS[law], noise=0.1)
    n = 2 * BLOCK_ROWS + 1000
    expected, _ = truth.sample(n, part="train")
    for batch_size in (700, BLOCK_ROWS, 3 * BLOCK_ROWS):
        batches = list(truth.stream(batch_size=batch_size).batches(n))
        assert [len(b["synthetic"]) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert torch.equal(rows(batches), expected)
    assert torch.equal(rows(make(**LAWS[law], noise=0.1).stream().batches(n)), expected)


def test_any_rows_can_be_had_with_their_codes() -> None:
    truth = make(noise=0.1)
    x, codes = truth.sample(3 * BLOCK_ROWS)
    first = BLOCK_ROWS - 5
    some, some_codes = truth.sample(BLOCK_ROWS + 10, first_row=first)
    assert torch.equal(some, x[first : 2 * BLOCK_ROWS + 5])
    assert torch.equal(some_codes.to_dense(), codes.to_dense()[first : 2 * BLOCK_ROWS + 5])
    assert isinstance(codes, Codes)


def test_parts_seeds_and_epochs_share_no_row() -> None:
    truth, other = make(noise=0.1), make(noise=0.1, seed=4)
    source = truth.stream()._source
    n = BLOCK_ROWS
    drawn = [
        *(truth.sample(2 * n, seed=s, part=part)[0] for s in (0, 1) for part in ("own", "train")),
        truth.sample(2 * n, part="held_out")[0],
        other.sample(2 * n)[0],
        other.sample(2 * n, part="train")[0],
        source.shuffled_rows(0, 1, 0, 2 * n, LeftOut())["synthetic"],
    ]
    everything = torch.cat(drawn)
    assert len(torch.unique(everything, dim=0)) == len(everything)


def test_every_stream_holds_the_same_rows_out_and_trains_on_none_of_them() -> None:
    truth = make(noise=0.1)
    n = BLOCK_ROWS + 100
    held_out = rows(truth.stream(held_out_rows=n).held_out_batches())
    assert torch.equal(held_out, truth.sample(n, part="held_out")[0])
    assert torch.equal(held_out, truth.sample(n, part="held_out", seed=5)[0])
    source = truth.stream(held_out_rows=n)._held_out_source
    chunks = source.chunks(np.arange(source.n_items), Progress())
    assert [len(chunk["synthetic"]) for chunk in chunks] == [BLOCK_ROWS, 100]
    assert torch.equal(held_out[:50], rows(truth.stream(seed=7).held_out_batches(50)))
    trained = rows(truth.stream().batches(3 * n))
    assert len(torch.unique(torch.cat([held_out, trained]), dim=0)) == 4 * n
    with pytest.raises(ValueError, match="Nothing was held out"):
        truth.stream(held_out_rows=0).held_out_batches()


def test_a_stream_goes_on_from_the_middle_of_a_block() -> None:
    truth = make(noise=0.1)
    n = 3 * BLOCK_ROWS
    whole = truth.stream(batch_size=1000).batches(n)
    expected = [next(whole)["synthetic"] for _ in range(5)]
    position = whole.state()
    rest = rows(whole)
    assert torch.equal(rows(truth.stream(batch_size=1000).batches(n, position)), rest)
    assert torch.equal(torch.cat([*expected, rest]), truth.sample(n, part="train")[0])


def test_batches_are_new_tensors() -> None:
    stream = make().stream(batch_size=100)
    next(stream.batches(100))["synthetic"].zero_()
    assert torch.equal(rows(stream.batches(100)), make().sample(100, part="train")[0])


def test_an_epoch_has_no_end_and_costs_nothing_to_begin() -> None:
    stream = make().stream(batch_size=512)
    assert stream.n_rows == EPOCH_ROWS
    shuffled, ordered = next(stream.epoch()), next(stream.epoch(shuffle=False))
    assert torch.equal(shuffled["synthetic"], ordered["synthetic"])
    assert [len(chunk["synthetic"]) for chunk in stream.sample_chunks(3)] == [BLOCK_ROWS] * 3
    assert stream.buffer_bytes == BLOCK_ROWS * 16 * 4
    assert not stream.has_buffer


def test_fingerprints_differ_where_rows_do() -> None:
    options = [
        {},
        {"seed": 4},
        {"noise": 0.1},
        {"magnitude": "half_normal"},
        {"density": 0.06},
        {"density_distribution": "zipf"},
        {"correlation": 0.1},
        {"correlation": 0.2},
    ]
    found = {make(**one).stream().fingerprint for one in options}
    found |= {make().stream(seed=1).fingerprint, make().stream(hook_name="b").fingerprint}
    assert len(found) == len(options) + 2
    assert make().stream().fingerprint == make().stream().fingerprint


@pytest.mark.gpu
def test_a_gpu_draws_the_same_law_and_goes_on_with_the_same_rows() -> None:
    options = {**LAWS["both, and pairs"], "noise": 0.1}
    truth = make(**options, device="cuda")
    assert torch.equal(truth.directions.cpu(), make(**options).directions)
    x, codes = truth.sample(N_ROWS, part="train")
    assert within(codes.firing_counts().double(), truth.densities, N_ROWS)
    noise = x - codes.to_dense() @ truth.directions
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(rows(truth.stream(batch_size=1000).batches(N_ROWS)), x)


# With everything that takes a stream.


def test_training_is_gone_on_with_to_the_last_bit(tmp_path: Any, monkeypatch: Any) -> None:
    from saefeat.training.bank_learner import BankLearner

    truth = make(noise=0.05)

    def run(out: Any) -> sf.Bank:
        return sf.train(
            truth.stream(batch_size=500),
            sf.TopKConfig(k=2),
            expansion_factors=[4],
            n_tokens=10_000,
            out=out,
            checkpoint_every=4,
            resume=True,
            device="cpu",
            progress=False,
        )

    expected = run(tmp_path / "whole")
    plain = BankLearner.step

    def step(self: Any, *batch: Any) -> Any:
        if self.step_number == 14:
            raise KeyError("crash")
        return plain(self, *batch)

    monkeypatch.setattr(BankLearner, "step", step)
    with pytest.raises(KeyError):
        run(tmp_path / "run")
    monkeypatch.undo()
    resumed = run(tmp_path / "run")
    for key, dictionary in expected.items():
        assert torch.equal(dictionary.W_dec, resumed[key].W_dec)
    plan = sf.plan(truth.stream(batch_size=500), sf.TopKConfig(k=2), n_tokens=10_000)
    assert plan.buffer_bytes == BLOCK_ROWS * 16 * 4
    report = sf.measure(resumed, truth.stream(), n_tokens=5000)
    assert report.rows[0].l0 <= 2


def test_rows_are_cached_and_read_back(tmp_path: Any) -> None:
    truth = make(noise=0.1)
    store = sf.cache_activations(
        truth.stream(batch_size=1000), tmp_path / "acts", 10_000, progress=False
    )
    assert (store.n_rows, store.n_held_out_rows) == (10_000, 1000)
    stored = sf.ActivationStream.from_store(tmp_path / "acts")
    expected = truth.sample(10_000, part="train")[0]
    read = rows(stored)
    assert torch.equal(read[np.lexsort(read.numpy().T)], expected[np.lexsort(expected.numpy().T)])
    assert torch.equal(rows(stored.held_out_batches()), truth.sample(1000, part="held_out")[0])


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_features": 0}, "n_features=0 must be"),
        ({"d_in": 0}, "d_in=0 must be"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"noise": -0.1}, "noise=-0.1 must be"),
        ({"noise": math.nan}, "noise=nan must be"),
        ({"density": 0.0}, "^0 is no density"),
        ({"density": 1.5}, "largest at 1.5, above 1"),
        ({"density": math.nan}, "^nan is no density"),
        ({"density": 0.3, "density_distribution": "zipf"}, "above 1. Lower the density"),
        ({"density_distribution": "normal"}, "'normal' is unknown"),
        ({"density_ratio": 0.5}, "density_ratio=0.5 must be"),
        ({"magnitude": "cauchy"}, "'cauchy' is unknown"),
        ({"correlation": 1.0}, "correlation=1.0 must be"),
        ({"correlation": -0.1}, "correlation=-0.1 must be"),
        ({"correlation_block_size": 1}, "correlation_block_size=1 must be"),
        ({"hierarchy": 0.5}, "find no parent"),
        ({"hierarchy": 1.0}, "hierarchy=1.0 must be"),
        ({"n_pairs": 21}, "21 pairs need 42 features, of 40"),
        ({"n_pairs": 1, "pair_density": 1.1}, "^1.1 is no density"),
        ({"density": torch.full((39,), 0.1)}, "density holds 39 numbers, but 40"),
        (
            {"density": torch.full((40,), 0.1), "density_distribution": "zipf"},
            "Give one or the other",
        ),
        ({"directions": torch.eye(16)}, r"directions has shape \[16, 16\]"),
        ({"directions": torch.ones(40, 16)}, "must be unit vectors"),
        ({"directions": torch.full((40, 16), math.nan)}, "must be unit vectors"),
        ({"device": "cuda:99"}, "asks for a GPU"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_rows_that_cannot_be_are_refused() -> None:
    truth = make()
    for options in ({"n_rows": 0}, {"n_rows": 5, "seed": -1}, {"n_rows": 5, "first_row": -1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            truth.sample(**options)
    with pytest.raises(ValueError, match="held_out_rows=-1 must be"):
        truth.stream(held_out_rows=-1)
