"""Universality: the values that theory gives for dictionaries whose relation is known."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny_models import WIDTH, tiny_model, token_ids
from torch import Tensor
from torch.nn.functional import normalize

import saefeat as sf
from saefeat.dictionaries.base import Origin
from saefeat.dictionaries.standard import Standard
from saefeat.kernels.codes import Codes
from saefeat.superposition.assignment import assign_pairs
from saefeat.superposition.universality import (
    aligned_batches,
    centred,
    correlate,
    matched_rsa,
    matched_svcca,
    mmcs,
    mmcs_null,
    mmcs_null_like,
    rows_of_codes,
    rsa,
    svcca,
)
from saefeat.superposition.universality.latent_rows import Centred
from saefeat.superposition.universality.score import (
    Resampled,
    context_blocks,
    draw_weights,
    resample,
    score,
)

HOOK = "blocks.1.hook_resid_post"


def directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    return normalize(torch.randn(n, d, generator=generator), dim=1)


def sparse_codes(n: int, w: int, generator: torch.Generator, density: float = 0.1) -> Tensor:
    on = torch.rand(n, w, generator=generator) < density
    return on * (0.5 + torch.rand(n, w, generator=generator))


def prepared(dense: Tensor, tokens: np.ndarray | None = None, least_firing: int = 1) -> Centred:
    halves = dense.tensor_split(2)
    codes = rows_of_codes([Codes.from_dense(half) for half in halves])
    return centred(codes, least_firing=least_firing, tokens=tokens)


def dictionary(rows: Tensor, hook_name: str, threshold: float = 0.1) -> Standard:
    """f = ReLU(rows @ x - threshold); without one, rounding puts latents on."""
    w, d = rows.shape
    made = Standard(sf.StandardConfig(), d, w, Origin(hook_name=hook_name))
    with torch.no_grad():
        made.W_dec.copy_(rows)
        made.encoder.copy_(rows)
        made.b_enc.fill_(-threshold)
    return made


def rotation(d: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=generator))[0]


# Correlations.


def test_correlations_are_numpys_for_sparse_dense_and_nearly_constant_latents(
    generator: torch.Generator,
) -> None:
    a = (torch.randn(400, 12, generator=generator) - 0.8).relu()
    mixed = a[:, torch.randperm(12, generator=generator)[:9]]
    b = (mixed + 0.4 * torch.randn(400, 9, generator=generator)).relu()
    a[:, 2] += 4096  # always on, with a mean 10,000 times its deviation
    b[:, 1] += 128
    b[:, 0] = 0
    found = correlate(prepared(a), prepared(b), least=0.05)
    expected = np.corrcoef(a.double().T, b[:, 1:].double().T)[:12, 12:]
    np.testing.assert_allclose(found.largest_a, expected.max(1).clip(0), atol=1e-12)
    np.testing.assert_allclose(found.largest_b[1:], expected.max(0).clip(0), atol=1e-12)
    assert found.largest_b[0].isnan()
    assert found.n_counted == (12, 8)
    worth = np.where(expected >= 0.05, expected, 0)
    best = worth[linear_sum_assignment(worth, maximize=True)].sum()
    assert float(found.pairs.weights.sum()) == pytest.approx(best, abs=1e-12)
    assert found.mean == pytest.approx(best / 8)
    assert found.mppc[0] == pytest.approx(expected.max(1).clip(0).mean())


def test_pairs_are_the_same_however_few_are_kept_at_once(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (sparse_codes(300, 130, generator, 0.3) for _ in range(2))
    whole = correlate(prepared(a), prepared(b), least=0.02)
    monkeypatch.setattr("saefeat.kernels.compiled_correlation.KEPT_AT_ONCE", 1)
    parts = correlate(prepared(a), prepared(b), least=0.02)
    assert torch.equal(whole.pairs.rows, parts.pairs.rows)
    assert torch.equal(whole.pairs.weights, parts.pairs.weights)
    assert torch.equal(whole.largest_b, parts.largest_b)


def test_token_means_are_regressed_out_exactly(generator: torch.Generator) -> None:
    tokens = torch.randint(0, 30, (500,), generator=generator).numpy()
    a = (torch.randn(500, 8, generator=generator) - 0.5).relu()
    b = (a + 0.5 * torch.randn(500, 8, generator=generator)).relu()
    one_hot = np.eye(30)[tokens]

    def residual(dense: Tensor) -> np.ndarray:
        values = dense.double().numpy()
        return values - one_hot @ np.linalg.lstsq(one_hot, values, rcond=None)[0]

    found = correlate(prepared(a, tokens), prepared(b, tokens), least=0.01)
    expected = np.corrcoef(residual(a).T, residual(b).T)[:8, 8:]
    np.testing.assert_allclose(found.largest_a, expected.max(1), atol=1e-12)


def test_latents_that_name_the_same_tokens_are_alike_until_these_are_regressed_out(
    generator: torch.Generator,
) -> None:
    """Each latent is on at one token, with a strength of its own; the last only says which."""
    tokens = torch.randint(0, 10, (4000,), generator=generator)
    on = torch.nn.functional.one_hot(tokens, 10).float()
    a, b = (on * (1 + torch.rand(4000, 10, generator=generator)) for _ in range(2))
    a[:, 9], b[:, 9] = on[:, 9], on[:, 9]
    assert correlate(prepared(a), prepared(b)).mean > 0.9
    regressed = correlate(*(prepared(one, tokens.numpy()) for one in (a, b)))
    assert regressed.mean < 0.05
    # A latent that only names a token has nothing left to be compared.
    assert regressed.n_counted == (9, 9)


def test_rare_latents_are_not_counted(generator: torch.Generator) -> None:
    a = sparse_codes(1000, 5, generator)
    a[:, 3] = 0
    a[:4, 3] = 1
    assert prepared(a, least_firing=4).n_counted == 5
    assert prepared(a, least_firing=5).n_counted == 4
    none = correlate(prepared(a, least_firing=1000), prepared(a, least_firing=1000))
    assert (none.n_counted, none.mean, none.mppc) == ((0, 0), 0.0, (0.0, 0.0))
    found = correlate(prepared(a, least_firing=5), prepared(a, least_firing=5))
    assert found.pairs.rows.tolist() == [0, 1, 2, 4]


def test_codes_are_kept_without_their_zeros_and_not_changed() -> None:
    latents = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32)
    codes = Codes.from_rows(latents, torch.tensor([[0.0, 1.0], [0.0, 3.0]]), 4)
    kept = rows_of_codes([codes, codes])
    assert kept.nnz == 4
    np.testing.assert_array_equal(kept.toarray(), codes.to_dense().repeat(2, 1))
    assert codes.values.tolist() == [0, 1, 0, 3]
    assert codes.latents.tolist() == [2, 0, 1, 2]


def test_codes_that_cannot_be_correlated_are_refused() -> None:
    with pytest.raises(ValueError, match="no batch was given"):
        rows_of_codes([])
    for bad in (-1.0, torch.nan):
        with pytest.raises(ValueError, match="finite and not negative"):
            rows_of_codes([Codes.from_dense(torch.tensor([[1.0, bad]]))])
    a, b = prepared(torch.eye(4)), prepared(torch.eye(6))
    with pytest.raises(ValueError, match="got 4 and 6 rows"):
        correlate(a, b)
    with pytest.raises(ValueError, match="least must be above 0"):
        correlate(a, a, least=0.0)


# Assignment.


def random_pairs(n: int, degree: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    left = torch.arange(n).repeat_interleave(degree)
    right = torch.randint(0, n, (n * degree,), generator=generator)
    keys = (left * n + right).unique()
    weights = torch.rand(len(keys), generator=generator, dtype=torch.float64) + 0.01
    return keys // n, keys % n, weights


def test_large_components_are_assigned_exactly_from_the_list_of_pairs(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right, weights = random_pairs(300, 4, generator)
    table = torch.zeros(300, 300, dtype=torch.float64)
    table[left, right] = weights
    best = table.numpy()[linear_sum_assignment(table.numpy(), maximize=True)].sum()
    for dense_up_to in (512, 1):
        monkeypatch.setattr("saefeat.superposition.assignment.DENSE_UP_TO", dense_up_to)
        made = assign_pairs(left, right, weights, 300, 300)
        assert made.is_exact
        assert float(made.weights.sum()) == pytest.approx(best)
        assert len(made.rows.unique()) == len(made.rows) == len(made.columns.unique())
        assert torch.equal(table[made.rows, made.columns], made.weights)


@pytest.mark.parametrize("shape", [(500, 500), (500, 40), (40, 500)])
def test_the_auction_loses_no_more_than_it_says_and_little(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    left, right, weights = random_pairs(500, 6, generator)
    left, right = left % shape[0], right % shape[1]
    _, first = np.unique(left * 500 + right, return_index=True)
    left, right, weights = left[first], right[first], weights[first]
    exact = assign_pairs(left, right, weights, *shape)
    near = assign_pairs(left, right, weights, *shape, exact_up_to=10)
    assert len(near.rows.unique()) == len(near.rows) == len(near.columns.unique())
    lost = float(exact.weights.sum() - near.weights.sum())
    assert lost >= -1e-9
    assert lost <= near.loss + 1e-9
    assert near.loss <= 0.0001 * len(near.rows) + 1e-9
    assert not near.is_exact


def test_pairs_that_weigh_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 0"):
        assign_pairs(torch.tensor([0]), torch.tensor([0]), torch.zeros(1).double(), 1, 1)


# Directions.


@pytest.mark.parametrize(("d", "w"), [(2, 1), (8, 4), (16, 3000), (64, 256), (256, 2000)])
def test_the_null_of_the_largest_cosine_is_that_of_random_directions(
    d: int, w: int, generator: torch.Generator
) -> None:
    drawn = [mmcs(directions(1500, d, generator), directions(w, d, generator)) for _ in range(4)]
    error = 4 * max(float(np.std(drawn)) / 2, 0.002 if w > 1 else 0.02)
    assert np.mean(drawn) == pytest.approx(mmcs_null(d, w), abs=error)


def test_the_null_tends_to_the_square_root() -> None:
    assert mmcs_null(100_000, 1000) == pytest.approx(math.sqrt(2 * math.log(1000) / 1e5), rel=0.15)
    assert mmcs_null(3, 1) == pytest.approx(0, abs=1e-9)


def test_the_null_with_covariance_is_higher_where_rows_fill_few_directions(
    generator: torch.Generator,
) -> None:
    stretch = torch.tensor([3.0] * 4 + [0.3] * 60)
    a, b = (directions(800, 64, generator) * stretch for _ in range(2))
    assert mmcs(a, b) > 2 * mmcs_null(64, 800)
    assert mmcs_null_like(a, b) == pytest.approx(mmcs(a, b), abs=0.06)
    a, b = (directions(800, 64, generator) for _ in range(2))
    assert mmcs_null_like(a, b) == pytest.approx(mmcs_null(64, 800), abs=0.02)


def test_a_rotation_leaves_svcca_and_rsa_at_1_and_cosines_at_their_null(
    generator: torch.Generator,
) -> None:
    a = directions(600, 32, generator)
    b = a @ rotation(32, generator)
    assert svcca(a, b) == pytest.approx(1)
    assert rsa(a, b) == pytest.approx(1)
    assert mmcs(a, b) == pytest.approx(mmcs_null(32, 600), abs=0.02)
    assert mmcs(a, a) == pytest.approx(1, abs=1e-6)
    for one in (matched_svcca(a, b), matched_rsa(a, b)):
        assert one.value == pytest.approx(1)
        assert one.null < 0.5
        assert one.p_value == pytest.approx(1 / 21)


def test_unrelated_directions_are_as_alike_as_their_null(generator: torch.Generator) -> None:
    a, b = directions(900, 24, generator), directions(900, 40, generator)
    for one, tolerance in ((matched_svcca(a, b), 0.02), (matched_rsa(a, b), 0.01)):
        assert one.value == pytest.approx(one.null, abs=tolerance)
        assert one.p_value > 0.05
    assert matched_rsa(a, b).null == pytest.approx(0, abs=0.01)


def test_svcca_of_few_pairs_is_near_1_and_its_null_says_so(generator: torch.Generator) -> None:
    one = matched_svcca(directions(20, 32, generator), directions(20, 32, generator))
    assert one.value > 0.9
    assert one.null == pytest.approx(one.value, abs=0.03)


def test_directions_that_cannot_be_compared_are_refused(generator: torch.Generator) -> None:
    a = directions(5, 4, generator)
    with pytest.raises(ValueError, match="one space, got widths 4 and 6"):
        mmcs(a, directions(5, 6, generator))
    with pytest.raises(ValueError, match="all rows of a dictionary are 0"):
        mmcs(a, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="at least 3 of them, got 5 and 4"):
        svcca(a, a[:4])
    with pytest.raises(ValueError, match="all rows of a dictionary are equal"):
        svcca(a, torch.ones(5, 4))
    with pytest.raises(ValueError, match="width of at least 2"):
        mmcs_null(1, 10)


# The score.


def sample(generator: torch.Generator, n_contexts: int) -> list[Tensor]:
    """A, B and A' on contexts of 20 rows, in each of which other latents are frequent.

    B has half of A's latents and A' has all, both with noise of their own that is the same within
    a context, so that rows are far from independent.
    """
    n, w = 20 * n_contexts, 10

    def contextual(scale: float) -> Tensor:
        return scale * torch.randn(n_contexts, w, generator=generator).repeat_interleave(20, 0)

    truth, other = (
        contextual(1.0) + 0.5 * torch.randn(n, w, generator=generator) for _ in range(2)
    )
    half = torch.cat([truth[:, :5], other[:, 5:]], dim=1)
    return [
        (one + contextual(0.6) + 0.3 * torch.randn(n, w, generator=generator)).relu()
        for one in (truth, half, truth)
    ]


def scored(
    a: Tensor, b: Tensor, again: Tensor, blocks: np.ndarray, seed: int
) -> tuple[Resampled, Resampled, Resampled]:
    codes = [rows_of_codes([Codes.from_dense(one)]) for one in (a, b, again)]
    codes.append(rows_of_codes([Codes.from_dense(b.roll(len(b) // 2, 0))]))
    weights = draw_weights(int(blocks.max()) + 1, 200, seed)
    first, *others = (centred(one, least_firing=10) for one in codes)
    matched, ceiling, null = (
        resample(correlate(first, other, least=0.2), codes[0], matrix, blocks, weights)
        for other, matrix in zip(others, codes[1:], strict=True)
    )
    return matched, null, ceiling


def test_intervals_over_contexts_cover_and_over_rows_would_not() -> None:
    generator = torch.Generator().manual_seed(1)
    large = sample(generator, 5000)
    truth = score("shifted", *scored(*large, context_blocks(np.arange(100_000) // 20), 0))
    assert truth.u is not None
    covered, covered_r, covered_by_rows = 0, 0, 0
    n_repeats = 100
    for repeat in range(n_repeats):
        rows = sample(generator, 200)
        blocks = context_blocks(np.arange(4000) // 20)
        one = score("shifted", *scored(*rows, blocks, repeat))
        wrong = score("shifted", *scored(*rows, np.arange(4000) % 200, repeat))
        assert one.u is not None
        assert wrong.u is not None
        covered += one.u.low <= truth.u.value <= one.u.high
        covered_r += one.matched.low <= truth.matched.value <= one.matched.high
        covered_by_rows += wrong.matched.low <= truth.matched.value <= wrong.matched.high
    assert 87 <= covered <= 100
    assert 87 <= covered_r <= 100
    assert covered_by_rows < 75


def test_a_resample_is_the_correlation_over_its_rows(generator: torch.Generator) -> None:
    a = (torch.randn(400, 6, generator=generator) - 0.3).relu()
    b = (a + torch.randn(400, 6, generator=generator)).relu()
    a[:, 0] += 100
    blocks = context_blocks(np.arange(400) // 20)
    weights = np.ones((2, 20))
    weights[1, :10], weights[1, 10:] = 2, 0
    matrices = [rows_of_codes([Codes.from_dense(one)]) for one in (a, b)]
    for tokens in (None, np.arange(400) % 7):
        first, second = (centred(one, least_firing=1, tokens=tokens) for one in matrices)
        found = correlate(first, second, least=0.05)
        drawn = resample(found, *matrices, blocks, weights, tokens=tokens)
        values = [one.double().numpy() for one in (a, b)]
        if tokens is not None:
            one_hot = np.eye(7)[tokens]
            values = [x - one_hot @ np.linalg.lstsq(one_hot, x, rcond=None)[0] for x in values]
        halves = [
            np.corrcoef(values[0][:200, i], values[1][:200, j])[0, 1]
            for i, j in zip(found.pairs.rows, found.pairs.columns, strict=True)
        ]
        assert drawn.draws[0] == pytest.approx(found.mean, abs=1e-9)
        assert drawn.draws[1] == pytest.approx(sum(halves) / 6, abs=1e-9)


def test_u_is_undefined_where_another_seed_is_no_more_alike_than_chance() -> None:
    draws = 0.05 + 0.01 * np.linspace(-1, 1, 100)
    chance = Resampled(value=0.05, draws=draws)
    again = Resampled(value=0.051, draws=draws[::-1] + 0.001)
    assert score("shifted", chance, chance, again).u is None
    assert score("shifted", chance, chance).u is None
    far = Resampled(value=0.9, draws=draws + 0.85)
    assert score("shifted", far, chance, far).u is not None


def test_too_few_contexts_or_resamples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 10, and the rows are of 9"):
        context_blocks(np.arange(90) // 10)
    assert len(np.unique(context_blocks(np.arange(10)))) == 10
    assert len(np.unique(context_blocks(np.arange(1234)))) == 200
    with pytest.raises(ValueError, match="at least 40 resamples"):
        draw_weights(10, 39, 0)


# The whole, on dictionaries whose relation is known.


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Standard, sf.ActivationStream]]:
    """Four "models" of 48 orthogonal features in 64 dimensions, each with its own rotation."""
    generator = torch.Generator().manual_seed(3)
    n, w, d = 20_000, 48, 64
    codes, other, unrelated = (sparse_codes(n, w, generator) for _ in range(3))
    half = torch.cat([codes[:, : w // 2], other[:, w // 2 :]], dim=1)
    order = torch.randperm(w, generator=generator)
    rows, made = {}, {}
    named = {"a": codes, "rotated": codes[:, order], "half": half, "unrelated": unrelated}
    for name, values in named.items():
        decoder = rotation(d, generator)[:w]
        rows[name] = values @ decoder
        made[name] = dictionary(decoder, name)
    stream = sf.ActivationStream.from_tensors(rows, held_out_fraction=0.5)
    return {name: (one, stream) for name, one in made.items()}


def compared(models: Any, other: str, **options: Any) -> sf.Universality:
    options = {"n_resamples": 100, "progress": False} | options
    return sf.universality(models["a"], models[other], again=models["rotated"], **options)


def test_identical_dictionaries_are_wholly_universal(models: Any) -> None:
    result = compared(models, "a")
    assert result.correlations.min() > 1 - 1e-9
    assert torch.equal(result.rows, result.columns)
    assert result.scores[0].u is not None
    assert result.scores[0].u.value == pytest.approx(1, abs=1e-4)
    assert result.cosines is not None
    assert result.cosines.a_in_b == pytest.approx(1, abs=1e-6)
    assert result.svcca is not None
    assert result.svcca.value == pytest.approx(1)


def test_permuted_and_rotated_dictionaries_are_universal_though_no_cosine_says_so(
    models: Any,
) -> None:
    result = compared(models, "rotated")
    score = result.scores[0]
    assert result.share_above_half == 1
    assert result.mppc == pytest.approx((1, 1), abs=1e-4)
    assert score.u is not None
    assert score.u.value == pytest.approx(1, abs=1e-6)
    assert result.rsa is not None
    assert result.cosines is not None
    assert result.cosines.a_in_b == pytest.approx(result.cosines.null[0], abs=0.05)


def test_half_shared_dictionaries_score_a_half(models: Any) -> None:
    result = compared(models, "half")
    score = result.scores[0]
    assert result.share_above_half == 0.5
    assert score.null_name == "shifted"
    assert score.null.value == pytest.approx(0, abs=0.02)
    assert score.u is not None
    assert score.u.value == pytest.approx(0.5, abs=0.02)
    assert score.u.low - 1e-9 <= score.u.value <= score.u.high + 1e-9
    text = str(result)
    assert "50.0% above 0.5" in text
    assert "latents counted   48 of 48" in text


def test_unrelated_dictionaries_score_nothing(models: Any) -> None:
    result = compared(models, "unrelated", random=models["unrelated"], least_correlation=0.01)
    assert [one.null_name for one in result.scores] == ["shifted", "random model"]
    for one in result.scores:
        assert one.u is not None
        assert one.u.value == pytest.approx(0, abs=0.005)
        assert one.matched.value > 0.005  # the assignment finds chance correlations
    assert result.share_above_half == 0


def test_without_another_seed_there_is_no_u(models: Any) -> None:
    result = sf.universality(models["a"], models["half"], n_resamples=50, progress=False)
    assert result.scores[0].u is None
    assert "no U without another seed" in str(result)


def test_options_and_hooks_that_do_not_fit_are_refused(models: Any) -> None:
    own, stream = models["a"]
    with pytest.raises(KeyError, match="no hook 'b'"):
        sf.universality((dictionary(torch.eye(4), "b"), stream), models["a"], progress=False)
    with pytest.raises(ValueError, match="least_firing must be at least 1"):
        sf.universality(models["a"], models["a"], least_firing=0)
    other = sf.ActivationStream.from_tensors({"a": torch.randn(100, 64)})
    with pytest.raises(ValueError, match="holds out no tokens"):
        sf.universality((own, stream), (own, other), progress=False)


def test_codes_that_will_not_fit_are_refused_after_the_first_batch(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "saefeat.superposition.universality.measure.available_host_bytes"
    # 10,000 held-out rows of about 4.8 latents, 32 bytes kept and 80 more while correlating.
    monkeypatch.setattr(place, lambda: 4_500_000)
    with pytest.raises(ValueError, match=r"10,000 tokens would take 0.00.* 10 latents are on"):
        sf.universality(models["a"], models["half"], progress=False)
    monkeypatch.setattr(place, lambda: 6_000_000)
    sf.universality(models["a"], models["half"], n_resamples=50, progress=False)


# Rows of several streams.


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("bridge of Llama")


def held_out(model: Any, ids: Tensor, **options: Any) -> sf.ActivationStream:
    tokens = sf.load_tokens(ids, held_out_fraction=0.5)
    return sf.ActivationStream.from_model(model, tokens, HOOK, batch_size=13, **options)


def test_rows_of_two_models_are_the_same_tokens_also_where_one_leaves_outliers_out(
    llama: Any,
) -> None:
    ids = token_ids(40, 16)
    # Of 1.03 medians and above everything is an outlier: a third of the rows goes.
    whole = held_out(llama, ids, max_norm_ratio=None)
    partial = held_out(llama, ids, max_norm_ratio=1.05, contexts_per_forward=3)
    every = torch.cat([batch[HOOK] for batch in whole.held_out_batches()]).view(20, 16, WIDTH)
    n_rows = 0
    for (a, b), known in aligned_batches([whole, partial], 10_000):
        torch.testing.assert_close(a[HOOK], b[HOOK], atol=1e-4, rtol=1e-4)
        assert torch.equal(a["token_ids"], b["token_ids"])
        keys = zip(known["contexts"].tolist(), known["positions"].tolist(), strict=True)
        for x, key in zip(a[HOOK], keys, strict=True):
            assert torch.equal(x, every[key])
        n_rows += len(a[HOOK])
    n_partial = sum(len(batch[HOOK]) for batch in partial.held_out_batches())
    assert n_rows == n_partial
    assert 100 < n_partial < 300
    assert partial.left_out.outlier_rows == 320 - n_partial
    given = [len(known["contexts"]) for _, known in aligned_batches([whole, partial], 50)]
    assert sum(given) == 50


def test_streams_of_other_tokens_are_refused(llama: Any) -> None:
    one, other = (held_out(llama, token_ids(20, 16, seed)) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"other token ids.*different tokenizers, from"):
        next(iter(aligned_batches([one, other], 10)))
    mask = torch.ones(20, 16)
    mask[:, -1] = 0
    tokens = sf.load_tokens(token_ids(20, 16), held_out_fraction=0.5, attention_mask=mask.long())
    masked = sf.ActivationStream.from_model(llama, tokens, HOOK)
    with pytest.raises(ValueError, match="count other positions"):
        next(iter(aligned_batches([one, masked], 10)))


def test_a_stored_stream_and_a_live_one_are_put_side_by_side(llama: Any, tmp_path: Any) -> None:
    live = held_out(llama, token_ids(40, 16), max_norm_ratio=None)
    sf.cache_activations(live, tmp_path / "acts", held_out_tokens=100, progress=False)
    stored = sf.ActivationStream.from_store(tmp_path / "acts")
    n_rows = 0
    for (a, b), _ in aligned_batches([live, stored], 10_000):
        torch.testing.assert_close(a[HOOK], b[HOOK], atol=1e-4, rtol=1e-4)
        n_rows += len(a[HOOK])
    assert n_rows == 100


def test_two_models_are_compared_on_text_with_tokens_regressed_out(llama: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    ids = token_ids(60, 16)
    decoder = directions(40, WIDTH, generator)
    own = dictionary(decoder, HOOK, 0.0), held_out(llama, ids)
    other = dictionary(decoder.flip(0), HOOK, 0.0), held_out(llama, ids)
    far = dictionary(directions(40, WIDTH, generator), HOOK, 0.0), own[1]
    result = sf.universality(own, far, again=other, n_resamples=50, progress=False)
    assert [one.null_name for one in result.scores] == ["shifted", "token identity"]
    assert result.n_contexts == 30
    for one in result.scores:
        assert one.again is not None
        assert one.again.value == pytest.approx(1, abs=1e-6)
        assert one.u is not None
        assert 0 < one.u.value < 1


# Widths.


def test_splitting_and_merging_across_widths_are_found(generator: torch.Generator) -> None:
    """Narrow 0 is wide 0; 1 is split into wide 1 and 2; 2 and 3 merge into wide 3; 4 is lost.

    Wide 4 and 5 are new. Features that merge or split share half of their direction.
    """
    basis = rotation(16, generator)
    single = [basis[0], basis[1], basis[2], basis[3], basis[4]]
    on = torch.rand(6000, 5, generator=generator) < 0.1
    on[:, 3] &= ~on[:, 2]
    child = torch.rand(6000, generator=generator) < 0.5
    x = torch.stack([on[:, i] * 1.0 for i in range(5)], dim=1) @ torch.stack(single)
    # Which child of feature 1 it is; what 2 and 3 have in common; and two features wide ones find.
    x += (on[:, 1] * (2.0 * child - 1))[:, None] * basis[5]
    x += (on[:, 2] | on[:, 3])[:, None] * basis[6]
    news = torch.rand(6000, 2, generator=generator) < 0.1
    x += news.float() @ basis[7:9]
    split = [normalize(basis[1] + sign * basis[5], dim=0) for sign in (1, -1)]
    merged = normalize(basis[2] + basis[3] + 2 * basis[6], dim=0)
    each = [normalize(basis[i] + basis[6], dim=0) for i in (2, 3)]
    narrow = dictionary(torch.stack([basis[0], basis[1], *each, basis[4]]), "x")
    wide = dictionary(torch.stack([basis[0], *split, merged, basis[7], basis[8]]), "x")
    thresholds = torch.tensor([0.4, 0.4, 0.9, 0.9, 0.4]), torch.full((6,), 0.4)
    with torch.no_grad():
        narrow.b_enc -= thresholds[0]
        wide.b_enc -= thresholds[1]
    stream = sf.ActivationStream.from_tensors({"x": x}, held_out_fraction=0.5)
    result = sf.across_widths(narrow, wide, stream, progress=False)
    found = [sorted(result.descendants(latent).tolist()) for latent in range(5)]
    assert found == [[0], [1, 2], [3], [3], []]
    assert result.is_split.tolist() == [False, True, False, False, False]
    assert result.is_merged.tolist() == [False, False, True, True, False]
    assert result.is_lost.tolist() == [False, False, False, False, True]
    assert result.is_kept.tolist() == [True, False, False, False, False]
    assert result.is_new.tolist() == [False, False, False, False, True, True]
    assert "1 kept, 1 split, 2 merged, 1 lost" in str(result)


def test_widths_of_other_hooks_or_exchanged_are_refused(models: Any) -> None:
    one, stream = models["a"]
    with pytest.raises(ValueError, match="compared at one hook"):
        sf.across_widths(one, models["half"][0], stream)
    with pytest.raises(ValueError, match="Were they exchanged"):
        sf.across_widths(one, dictionary(torch.eye(64)[:5], "a"), stream)
