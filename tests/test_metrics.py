"""Measures against closed forms, hand-written examples and independent computations."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import N_LAYERS, WIDTH, tiny_model, token_ids
from torch import Tensor
from torch.nn.functional import cross_entropy

import saefeat as sf
from saefeat.activations.tokens import Tokens
from saefeat.kernels.codes import Codes, SparsityPattern
from saefeat.metrics import (
    ce_loss_recovered,
    effective_features,
    feature_density,
    features_per_neuron,
    fraction_variance_unexplained,
    l0,
    normalized_mse,
)
from saefeat.metrics.fidelity import FidelitySums
from saefeat.metrics.loss_recovered import CrossEntropy, next_token_loss
from saefeat.metrics.sparsity import ULTRALOW_DENSITY, SparsityCounts

HOOK = "blocks.1.hook_resid_post"


# Fidelity.


def test_the_mean_leaves_all_of_the_variance_and_a_copy_none(generator: torch.Generator) -> None:
    x = 3 + torch.randn(200, 7, generator=generator, dtype=torch.float64)
    assert float(fraction_variance_unexplained(x, x)) == 0
    assert float(fraction_variance_unexplained(x, x.mean(0).expand_as(x))) == pytest.approx(
        1, abs=1e-12
    )


def test_fvu_of_a_hand_written_example() -> None:
    target = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])  # mean (2, 2)
    recon = torch.tensor([[0.0, 0.0], [2.0, 1.0], [4.0, 2.0]])
    assert float(fraction_variance_unexplained(target, recon)) == pytest.approx(5 / 14)


@pytest.mark.parametrize("noise", [0.1, 1.0, 2.0])
def test_fvu_of_added_noise_is_the_ratio_of_variances(
    generator: torch.Generator, noise: float
) -> None:
    n, d = 20_000, 10
    x = 2 * torch.randn(n, d, generator=generator)
    recon = x + noise * torch.randn(n, d, generator=generator)
    # A ratio of two chi-squares of n * d degrees each: relative standard deviation 0.45 %.
    assert float(fraction_variance_unexplained(x, recon)) == pytest.approx(
        noise**2 / 4, rel=5 * math.sqrt(4 / (n * d))
    )


def test_fvu_is_the_same_far_from_the_origin(generator: torch.Generator) -> None:
    """Multiples of 1/16, which float32 still holds exactly at 1e6 and a sum of squares does not."""
    x = torch.randint(-32, 33, (500, 6), generator=generator) / 16
    recon = x + torch.randint(-8, 9, (500, 6), generator=generator) / 16
    near, far = FidelitySums(), FidelitySums()
    for start in range(0, 500, 70):
        rows = slice(start, start + 70)
        near.update(x[rows], recon[rows])
        far.update(x[rows] + 1e6, recon[rows] + 1e6)
    assert torch.equal((x + 1e6).double(), x.double() + 1e6)
    assert far.fvu == pytest.approx(near.fvu, rel=1e-9)
    assert float(fraction_variance_unexplained(x + 1e6, recon + 1e6)) == pytest.approx(
        float(fraction_variance_unexplained(x, recon)), rel=1e-6
    )


def test_fvu_minds_neither_a_shift_nor_a_scale_nor_a_rotation(generator: torch.Generator) -> None:
    x, recon = torch.randn(2, 50, 6, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    moved = [7 + 3 * part @ rotation for part in (x, recon)]
    torch.testing.assert_close(
        fraction_variance_unexplained(*moved), fraction_variance_unexplained(x, recon)
    )


def test_uneven_batches_add_up_to_one_shot(generator: torch.Generator) -> None:
    x = 100 + torch.randn(1000, 5, generator=generator, dtype=torch.float64)
    recon = x + torch.randn(1000, 5, generator=generator, dtype=torch.float64)
    sums = FidelitySums()
    for rows in torch.arange(1000).split([1, 499, 0, 3, 300, 197]):
        sums.update(x[rows], recon[rows])
    assert sums.n_rows == 1000
    variance = (x - x.mean(0)).square().sum()
    assert sums.fvu == pytest.approx(float((x - recon).square().sum() / variance), rel=1e-12)
    assert sums.squared_deviation == pytest.approx(float(variance), rel=1e-12)
    relative = (x - recon).square().sum(1) / x.square().sum(1)
    assert sums.normalized_mse == pytest.approx(float(relative.mean()), rel=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("batch", [1, 7, 100])
def test_fvu_of_a_constant_is_an_error(constant: float, batch: int) -> None:
    sums = FidelitySums()
    for x in torch.full((100, 3), constant).split(batch):
        sums.update(x, x + 1)
    with pytest.raises(ValueError, match="all 100 rows of `target` are equal"):
        _ = sums.fvu


@pytest.mark.parametrize("n", [0, 1])
def test_fvu_of_fewer_than_two_rows_is_an_error(n: int) -> None:
    with pytest.raises(ValueError, match=f"{n} rows have no variance"):
        fraction_variance_unexplained(torch.ones(n, 3), torch.zeros(n, 3))


def test_shapes_that_differ_are_an_error() -> None:
    for recon in (torch.ones(4, 2), torch.ones(5, 3), torch.ones(1, 3), torch.ones(4, 3, 1)):
        with pytest.raises(ValueError, match="of one shape"):
            FidelitySums().update(torch.ones(4, 3), recon)
    with pytest.raises(ValueError, match="of one shape"):
        FidelitySums().update(torch.ones(4), torch.ones(4))


def test_normalised_mse_of_a_hand_written_example_leaves_rows_of_norm_0_out() -> None:
    target = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    recon = torch.tensor([[3.0, 3.0], [9.0, 9.0], [0.0, 0.0], [1.0, 0.0]])
    assert float(normalized_mse(target, recon)) == pytest.approx((1 / 25 + 1 + 0) / 3)
    with pytest.raises(ValueError, match="every row of `target` is 0"):
        normalized_mse(torch.zeros(3, 2), torch.ones(3, 2))


def test_measures_need_no_gradients_and_keep_none(generator: torch.Generator) -> None:
    x, recon = torch.randn(2, 9, 4, generator=generator)
    recon.requires_grad_()
    assert not fraction_variance_unexplained(x, recon).requires_grad
    assert not normalized_mse(x, recon).requires_grad
    counts = SparsityCounts(torch.ones(4))
    counts.update(Codes.from_dense(recon.relu()))
    assert not counts.activation_sums.requires_grad, "every batch's graph would stay in memory"
    assert counts.effective_features > 1
    assert effective_features(recon.detach().relu().sum(0).requires_grad_()) > 1


# Sparsity.


def stored_codes() -> Codes:
    """Latent 0 is on in 3 of 4 rows, 1 in one, 2 only as a stored zero, 3 nowhere; one row empty.

    2 . . .
    1 3 0 .
    . . . .
    4 . . .
    """
    return Codes(
        SparsityPattern(
            offsets=torch.tensor([0, 1, 4, 4, 5]), latents=torch.tensor([0, 2, 1, 0, 0]), d_sae=4
        ),
        torch.tensor([2.0, 0.0, 3.0, 1.0, 4.0]),
    )


def test_l0_and_density_count_what_is_above_zero() -> None:
    codes = stored_codes()
    assert float(l0(codes)) == 1
    assert feature_density(codes).tolist() == [0.75, 0.25, 0, 0]
    dense = codes.to_dense()
    assert torch.equal(feature_density(codes), (dense > 0).float().mean(0))


def test_counts_of_uneven_batches_add_up_to_one_shot(generator: torch.Generator) -> None:
    dense = torch.randn(200, 12, generator=generator).sub(1).relu()
    dense[:, 5] = 0
    counts = SparsityCounts(torch.ones(12))
    for part in dense.split([1, 120, 9, 70]):
        counts.update(Codes.from_dense(part))
    whole = Codes.from_dense(dense)
    assert counts.n_rows == 200
    assert counts.l0 == pytest.approx(float(l0(whole)), rel=1e-6)
    torch.testing.assert_close(counts.density.float(), feature_density(whole))
    assert counts.n_alive == 11
    torch.testing.assert_close(counts.activation_sums.float(), dense.sum(0))


def test_measures_of_no_rows_are_errors() -> None:
    empty = Codes.from_dense(torch.zeros(0, 4))
    for measure in (l0, feature_density):
        with pytest.raises(ValueError, match="no rows"):
            measure(empty)
    with pytest.raises(ValueError, match="no rows"):
        _ = SparsityCounts(torch.ones(4)).l0


def test_features_per_neuron_divides_and_refuses_the_impossible() -> None:
    assert features_per_neuron(1152, 576) == 2
    assert features_per_neuron(0, 1) == 0
    for n_features, n_neurons in ((1, 0), (-1, 4), (3, -2)):
        with pytest.raises(ValueError, match=f"n_neurons={n_neurons} and n_features={n_features}"):
            features_per_neuron(n_features, n_neurons)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_n_equal_contributions_are_n_effective_features(n: int) -> None:
    contributions = torch.cat([torch.full((n,), 0.3), torch.zeros(5)])
    assert effective_features(contributions) == pytest.approx(n, rel=1e-6)


def test_effective_features_of_a_known_mixture() -> None:
    """A half and two quarters have an entropy of 1.5 bits."""
    assert effective_features(torch.tensor([1.0, 2.0, 0.0, 1.0])) == pytest.approx(2**1.5)


def test_nothing_that_fires_is_no_effective_feature() -> None:
    assert effective_features(torch.zeros(5)) == 0


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_contributions_that_cannot_be_are_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="finite and not negative"):
        effective_features(torch.tensor([1.0, bad]))


def test_effective_features_do_not_mind_how_scale_is_split_between_code_and_decoder(
    generator: torch.Generator,
) -> None:
    dense = torch.randn(50, 6, generator=generator).relu()
    norms = torch.rand(6, generator=generator) + 0.5
    scale = torch.tensor([0.01, 1.0, 3.0, 100.0, 7.0, 0.2])
    one, other = SparsityCounts(norms), SparsityCounts(norms / scale)
    one.update(Codes.from_dense(dense))
    other.update(Codes.from_dense(dense * scale))
    assert other.effective_features == pytest.approx(one.effective_features, rel=1e-5)
    unweighted = SparsityCounts(torch.ones(6))
    unweighted.update(Codes.from_dense(dense * scale))
    assert unweighted.effective_features < 0.7 * one.effective_features


def test_ultralow_latents_fired_but_more_rarely_than_the_threshold() -> None:
    n_rows = 200_000
    firing = {0: 1, 1: 2, 2: 3, 3: n_rows}  # 5e-6, just 1e-5, 1.5e-5, always; latent 4 never
    latents = torch.tensor([[0, 3], [1, 3], [1, 3]] + [[2, 3]] * 3 + [[3, 4]] * (n_rows - 6))
    values = torch.tensor([[1.0, 1.0]] * 6 + [[1.0, 0.0]] * (n_rows - 6))
    counts = SparsityCounts(torch.ones(5))
    counts.update(Codes.from_rows(latents, values, 5))
    assert counts.firing.tolist() == [*firing.values(), 0]
    assert ULTRALOW_DENSITY == 1e-5
    assert (counts.n_alive, counts.n_ultralow) == (4, 1)


# Loss recovered.


def test_loss_recovered_is_one_at_clean_zero_at_ablated_and_linear_between() -> None:
    assert ce_loss_recovered(2.0, 2.0, 6.0) == 1
    assert ce_loss_recovered(2.0, 6.0, 6.0) == 0
    assert ce_loss_recovered(2.0, 3.0, 6.0) == 0.75
    assert ce_loss_recovered(2.0, 7.0, 6.0) == -0.25
    with pytest.raises(ValueError, match=r"leaves the loss at 2\.5000"):
        ce_loss_recovered(2.5, 2.6, 2.5)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("bridge of Llama")


@pytest.fixture
def tokens() -> Tokens:
    """Five contexts of eight; the first position counts nowhere, nor does one in the middle."""
    counts = torch.ones(5, 8, dtype=torch.bool)
    counts[:, 0] = False
    counts[2, 4] = False
    return Tokens(ids=token_ids(5, 8), counts=counts)


def expected_loss(logits: Tensor, ids: Tensor) -> float:
    """Mean over every position that has a next token, one after the other."""
    losses = [
        cross_entropy(logits[context, position], ids[context, position + 1])
        for context in range(ids.shape[0])
        for position in range(ids.shape[1] - 1)
    ]
    return float(torch.stack(losses).double().mean())


def loss_with(model: Any, ids: Tensor, hook_name: str, change: Callable[[Tensor], Tensor]) -> float:
    """The loss under TransformerLens's own way to change an activation."""
    with torch.no_grad():
        hooks = [(hook_name, lambda value, hook: change(value))]
        return expected_loss(model.run_with_hooks(ids, fwd_hooks=hooks), ids)


def zeroed_at(chosen: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: value.masked_fill(chosen[..., None], 0.0)


def test_the_clean_loss_is_that_of_the_logits(llama: Any, tokens: Tokens) -> None:
    with torch.no_grad():
        expected = expected_loss(llama.original_model(tokens.ids).logits, tokens.ids)
    for contexts_per_forward in (1, 2, 8):
        evaluation = CrossEntropy(llama, tokens, contexts_per_forward=contexts_per_forward)
        assert evaluation.clean() == pytest.approx(expected, rel=1e-6)


def test_logits_that_know_nothing_cost_the_logarithm_of_the_vocabulary() -> None:
    loss, n = next_token_loss(torch.full((3, 5, 50), 2.0), token_ids(3, 5))
    assert n == 12
    assert loss / n == pytest.approx(math.log(50), rel=1e-6)


def test_replacing_by_the_same_gives_exactly_the_clean_loss(llama: Any, tokens: Tokens) -> None:
    evaluation = CrossEntropy(llama, tokens, contexts_per_forward=2)
    clean = evaluation.clean()
    for layer in range(N_LAYERS):
        assert evaluation.replaced(f"blocks.{layer}.hook_resid_post", torch.clone) == clean


def test_zeros_where_positions_count_equal_run_with_hooks(llama: Any, tokens: Tokens) -> None:
    expected = loss_with(llama, tokens.ids, HOOK, zeroed_at(tokens.counts))
    for contexts_per_forward in (2, 8):
        evaluation = CrossEntropy(
            llama, tokens, max_norm_ratio=None, contexts_per_forward=contexts_per_forward
        )
        spliced = evaluation.replaced(HOOK, torch.zeros_like)
        assert spliced == pytest.approx(expected, rel=1e-6)
        everywhere = loss_with(llama, tokens.ids, HOOK, torch.zeros_like)
        assert abs(everywhere - expected) > 1e-4
        assert abs(evaluation.clean() - expected) > 1e-4


def test_the_replacement_is_given_the_positions_that_count_and_no_others(
    llama: Any, tokens: Tokens
) -> None:
    given: list[Tensor] = []

    def record(rows: Tensor) -> Tensor:
        given.append(rows.clone())
        return rows

    CrossEntropy(llama, tokens, contexts_per_forward=2).replaced(HOOK, record)
    rows = sf.read_activations(llama, tokens.ids, HOOK)[HOOK]
    torch.testing.assert_close(torch.cat(given), rows[tokens.counts.flatten()])
    assert [len(part) for part in given] == [14, 13, 7]
    assert given[0].dtype == torch.float32


def test_a_mean_is_put_in_place_of_every_row(llama: Any, tokens: Tokens) -> None:
    mean = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    spliced = CrossEntropy(llama, tokens).replaced(HOOK, mean.expand_as)
    expected = loss_with(
        llama, tokens.ids, HOOK, lambda value: torch.where(tokens.counts[..., None], mean, value)
    )
    assert spliced == pytest.approx(expected, rel=1e-6)


def test_attention_sinks_keep_their_activation(tokens: Tokens) -> None:
    """Tokens whose embedding is made 100 times as large stand for them."""
    model = tiny_model("bridge of Llama")
    sink = int(tokens.ids[1, 3])
    with torch.no_grad():
        model.original_model.model.embed_tokens.weight[sink] *= 100
    hook = "blocks.0.hook_resid_pre"
    is_sink = (tokens.ids == sink) & tokens.counts
    assert 1 <= int(is_sink.sum()) < 8
    given: list[int] = []

    def zero(rows: Tensor) -> Tensor:
        given.append(len(rows))
        return torch.zeros_like(rows)

    for ratio, chosen in ((10.0, tokens.counts & ~is_sink), (None, tokens.counts)):
        given.clear()
        spliced = CrossEntropy(model, tokens, max_norm_ratio=ratio).replaced(hook, zero)
        assert given == [int(chosen.sum())]
        expected = loss_with(model, tokens.ids, hook, zeroed_at(chosen))
        assert spliced == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["bridge of Llama", "HookedTransformer"])
def test_padding_neither_counts_nor_changes_the_loss(kind: str) -> None:
    model, ids = tiny_model(kind), token_ids(2, 6)
    whole = Tokens(ids=ids, counts=torch.ones(2, 6, dtype=torch.bool))
    mask = torch.arange(9).expand(2, 9) >= 3
    padded_ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    padded = Tokens(ids=padded_ids, counts=mask, attention_mask=mask)
    for replacement in (torch.clone, torch.zeros_like):
        torch.testing.assert_close(
            CrossEntropy(model, padded).replaced(HOOK, replacement),
            CrossEntropy(model, whole).replaced(HOOK, replacement),
            rtol=1e-5,
            atol=0,
        )


def test_a_batch_in_which_nothing_counts_is_left_as_it_is(llama: Any) -> None:
    ids = token_ids(2, 8)
    tokens = Tokens(ids=ids, counts=torch.zeros(2, 8, dtype=torch.bool))
    for ratio in (10.0, None):
        evaluation = CrossEntropy(llama, tokens, max_norm_ratio=ratio)
        assert evaluation.replaced(HOOK, torch.zeros_like) == evaluation.clean()


def test_contexts_of_one_token_have_no_loss(llama: Any) -> None:
    tokens = Tokens(ids=token_ids(3, 1), counts=torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="no position has a next token"):
        CrossEntropy(llama, tokens).clean()


def test_a_replacement_that_fails_leaves_no_hook_behind(llama: Any, tokens: Tokens) -> None:
    evaluation = CrossEntropy(llama, tokens)
    clean, point = evaluation.clean(), llama.hook_dict[HOOK]
    n_hooks = len(point.fwd_hooks), len(point._forward_hooks)

    def fail(rows: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluation.replaced(HOOK, fail)
    evaluation.replaced(HOOK, torch.zeros_like)
    assert (len(point.fwd_hooks), len(point._forward_hooks)) == n_hooks
    assert evaluation.clean() == clean
