"""Every backend computes what the reference does; the reference, what dense algebra says."""

import pytest
import torch

from saefeat.kernels import eager
from saefeat.kernels.autograd import rows_of, sparse_encode, squared_errors
from saefeat.kernels.codes import Codes, SparsityPattern
from saefeat.kernels.dispatch import BACKENDS, choose_kernels

CASES = {
    "usual": (64, 48, 96, 8),
    "odd sizes": (37, 13, 51, 5),
    "one latent a row": (16, 8, 32, 1),
    "every latent on": (9, 6, 12, 12),
    "one row": (1, 5, 7, 3),
}


def random_pattern(n: int, d_sae: int, k: int, generator: torch.Generator) -> SparsityPattern:
    scores = torch.rand(n, d_sae, generator=generator)
    return SparsityPattern.from_top_k(scores.topk(k, dim=1).indices, d_sae)


def ragged_pattern(generator: torch.Generator, n: int = 11, d_sae: int = 17) -> SparsityPattern:
    """Rows of different lengths, the first, a middle and the last one empty."""
    dense = torch.rand(n, d_sae, generator=generator) < 0.3
    dense[[0, n // 2, n - 1]] = False
    return Codes.from_dense(dense.float()).pattern


def patterns(generator: torch.Generator):
    for n, d, d_sae, k in CASES.values():
        yield random_pattern(n, d_sae, k, generator), d
    yield ragged_pattern(generator), 6
    yield Codes.from_dense(torch.zeros(4, 9)).pattern, 5


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend that can run on a processor, Triton's programs through its interpreter."""
    try:
        return choose_kernels(request.param, torch.device("cpu"))[1]
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_equal_dense_algebra(backend, dtype, generator):
    for pattern, d in patterns(generator):
        left = torch.randn(pattern.n_rows, d, generator=generator, dtype=dtype)
        right = torch.randn(pattern.d_sae, d, generator=generator, dtype=dtype)
        values = torch.randn(len(pattern.latents), generator=generator, dtype=dtype)
        dense = Codes(pattern, values).to_dense()
        scores = (left @ right.T)[pattern.rows, pattern.latents]
        torch.testing.assert_close(backend.sampled_product(pattern, left, right), scores)
        torch.testing.assert_close(backend.product(pattern, values, right), dense @ right)
        torch.testing.assert_close(
            backend.transposed_product(pattern, values, left), dense.T @ left
        )
        torch.testing.assert_close(backend.latent_sums(pattern, values), dense.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_keeps_the_largest_and_breaks_ties_within_k(backend, dtype, generator):
    scores = torch.randn(33, 71, generator=generator).to(dtype)
    scores[3] = 1.0  # every entry ties
    scores[4] = -torch.rand(71, generator=generator).to(dtype)
    scores[5, 9:] = scores[5, 0]  # ties at the least one kept
    scores[6] = torch.inf
    for k in (1, 7, 32, 71):
        latents = backend.top_k(scores, k)
        assert latents.shape == (33, k)
        assert all(len(row.unique()) == k for row in latents)
        kept = scores.gather(1, latents).sort(dim=1, descending=True).values
        assert torch.equal(kept, scores.sort(dim=1, descending=True).values[:, :k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_selections_of_a_batch_equal_the_reference(backend, case, dtype, generator):
    n, _, d_sae, k = CASES[case]
    scores = torch.randn(n, d_sae, generator=generator)
    scores[:, :2] = torch.tensor([0.0, -0.0])
    scores[n // 2] = -scores[n // 2].abs()  # a row with nothing positive
    scores[n // 3, d_sae // 2 :] = 1.0  # ties
    scores = scores.to(dtype)
    for n_kept in (1, k * n, n * d_sae):
        pattern, least = backend.batch_top_k(scores, n_kept)
        expected, expected_least = eager.batch_top_k(scores, n_kept)
        kept, wanted = (scores[as_mask(one)] for one in (pattern, expected))
        # Which of equal scores are kept, and whether those that are off are, is left open.
        kept, wanted = (one[one > 0].sort(descending=True).values for one in (kept, wanted))
        assert len(kept) >= min(n_kept, len(wanted))
        assert torch.equal(kept[:n_kept], wanted[:n_kept])
        assert least == expected_least
    for floor in (torch.zeros(d_sae), torch.full((d_sae,), -0.0), torch.linspace(-2, 2, d_sae)):
        expected = eager.above(scores, floor)
        assert torch.equal(as_mask(backend.above(scores, floor)), as_mask(expected))


def test_selections_read_columns_of_a_larger_matrix_as_they_do_a_copy(backend, generator):
    """As the scores of one dictionary among those of a bank are."""
    scores = torch.randn(70, 96, generator=generator).bfloat16()[:, 32:83]
    assert torch.equal(backend.top_k(scores, 5), backend.top_k(scores.contiguous(), 5))
    for select in (
        lambda s: backend.batch_top_k(s, 200)[0],
        lambda s: backend.above(s, torch.full((51,), 0.5)),
    ):
        assert torch.equal(as_mask(select(scores)), as_mask(select(scores.contiguous())))


def test_selections_of_nothing_are_empty(backend):
    for scores in (torch.full((70, 9), -1.0), torch.zeros(70, 9)):
        assert not (scores[as_mask(backend.batch_top_k(scores, 5)[0])] > 0).any()
        assert len(backend.above(scores, torch.zeros(9)).latents) == 0


def test_a_batch_whose_rows_differ_far_in_scale_is_ranked_as_a_whole(backend, generator):
    """So that a threshold guessed from some of the rows is wrong."""
    scores = torch.rand(640, 40, generator=generator)
    scores[::10] *= 1000
    pattern, least = backend.batch_top_k(scores, 5000)
    assert torch.equal(as_mask(pattern), scores >= least)
    assert least == scores.flatten().topk(5000).values[-1]


def as_mask(pattern):
    return Codes(pattern, torch.ones(len(pattern.latents))).to_dense() > 0


def test_products_are_bitwise_repeatable(backend, generator):
    pattern = random_pattern(100, 150, 16, generator)
    values = torch.randn(len(pattern.latents), generator=generator)
    rows = torch.randn(100, 64, generator=generator)
    first = backend.transposed_product(pattern, values, rows)
    again = SparsityPattern(pattern.offsets, pattern.latents, pattern.d_sae)
    assert torch.equal(first, backend.transposed_product(again, values, rows))


def weight(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def test_encode_and_errors_pass_gradcheck(backend, generator):
    pattern = ragged_pattern(generator, n=7, d_sae=6)
    x = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    shapes = ((6, 3), (6,), (3,), (6, 3), (len(pattern.latents),))
    encoder, b_enc, b_dec, decoder, values = (weight(generator, *shape) for shape in shapes)

    def encode(encoder, b_enc, b_dec):
        return sparse_encode(backend, pattern, x, encoder, b_enc, b_dec)

    def errors(values, decoder, b_dec):
        inside = pattern.latents < 3
        blocks = [Codes(pattern.where(part), values[part]) for part in (inside, ~inside)]
        return squared_errors(backend, blocks, [0.3, 0.7], x, decoder, b_dec)[0]

    def rows(encoder):
        return rows_of(encoder, torch.tensor([3, 0, 5]))

    assert torch.autograd.gradcheck(encode, (encoder, b_enc, b_dec))
    assert torch.autograd.gradcheck(errors, (values, decoder, b_dec))
    assert torch.autograd.gradcheck(rows, encoder)


def test_gradients_are_added_to_those_that_are_there(backend, generator):
    pattern = ragged_pattern(generator)
    x = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    weights = [weight(generator, 17, 6), weight(generator, 17), weight(generator, 6)]
    weights += [weight(generator, 17, 6)]

    def backward():
        scores = sparse_encode(backend, pattern, x, *weights[:3])
        blocks = [Codes(pattern, scores.relu())]
        error, _ = squared_errors(backend, blocks, [1.0], x, weights[3], weights[2])
        chosen = rows_of(weights[0], torch.tensor([2, 5])).square().sum()
        (error + chosen).backward()
        return [one.grad for one in weights]

    fresh = [gradient.clone() for gradient in backward()]
    buffers = [one.grad for one in weights]
    for before, after, buffer in zip(fresh, backward(), buffers, strict=True):
        assert after is buffer
        torch.testing.assert_close(after, 2 * before)


def unit_atoms(d_sae, d, generator, dtype=torch.float64):
    atoms = torch.randn(d_sae, d, generator=generator, dtype=dtype)
    return torch.nn.functional.normalize(atoms, dim=1)


@pytest.mark.parametrize("case", CASES)
def test_pursuit_picks_and_fits_as_the_reference_does(backend, case, generator):
    n, d, d_sae, k = CASES[case]
    atoms = unit_atoms(d_sae, d, generator)
    # Off-centre, so that some fits come out negative and are made again.
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.3
    x[0] = 0  # a row with nothing to pick
    codes = backend.matching_pursuit(x, atoms, k)
    expected = eager.matching_pursuit(x, atoms, k)
    torch.testing.assert_close(codes.to_dense(), expected.to_dense())
    assert (codes.values > 0).all()
    assert int(codes.row_counts()[0]) == 0


def test_pursuit_of_a_sparse_sum_finds_its_atoms(backend, generator):
    atoms = unit_atoms(64, 48, generator)
    true = torch.zeros(20, 64, dtype=torch.float64)
    chosen = torch.rand(20, 64, generator=generator).topk(3, dim=1).indices
    true.scatter_(1, chosen, 1 + torch.rand(20, 3, generator=generator, dtype=torch.float64))
    codes = backend.matching_pursuit(true @ atoms, atoms, 8, 1e-6)
    torch.testing.assert_close(codes.to_dense() @ atoms, true @ atoms)
    # It stops by itself where the three were picked first, and mostly they were.
    assert float((codes.row_counts() == 3).float().mean()) > 0.7


def test_pursuit_stops_at_its_tolerance(backend, generator):
    atoms, x = unit_atoms(96, 16, generator), torch.randn(30, 16, generator=generator).double()
    codes = backend.matching_pursuit(x, atoms, 12, 0.5)
    left = (x - codes.to_dense() @ atoms).norm(dim=1) / x.norm(dim=1)
    assert (left <= 0.5 + 1e-9).all()
    assert float(codes.row_counts().float().mean()) < 8


def test_pursuit_never_picks_an_atom_twice_nor_its_copy(backend, generator):
    atoms = unit_atoms(20, 8, generator)
    atoms[10:] = atoms[:10]
    x = torch.randn(25, 8, generator=generator, dtype=torch.float64)
    dense = backend.matching_pursuit(x, atoms, 8).to_dense()
    assert dense.isfinite().all()
    assert not ((dense[:, :10] > 0) & (dense[:, 10:] > 0)).any()


def test_pursuit_in_float32_leaves_as_little_as_in_float64(backend, generator):
    atoms = unit_atoms(128, 32, generator)
    x = torch.randn(60, 32, generator=generator, dtype=torch.float64)
    left = [
        (x - backend.matching_pursuit(x.to(t), atoms.to(t), 16).to_dense().double() @ atoms)
        .square()
        .sum()
        for t in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(left[0], left[1], rtol=1e-3, atol=0)


def test_codes_count_only_values_above_zero():
    codes = Codes.from_rows(
        torch.tensor([[0, 2], [2, 3]]), torch.tensor([[1.0, 0.0], [2.0, 3.0]]), 5
    )
    assert codes.firing_counts().tolist() == [1, 0, 1, 1, 0]
    assert codes.row_counts().tolist() == [1, 2]
    assert codes.to_dense().tolist() == [[1, 0, 0, 0, 0], [0, 0, 2, 3, 0]]


def test_codes_survive_the_way_through_dense(generator):
    dense = torch.randn(6, 10, generator=generator).relu()
    assert torch.equal(Codes.from_dense(dense).to_dense(), dense)


def test_without_mkl_the_compiled_kernels_are_chosen_still(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert choose_kernels("auto", torch.device("cpu"))[0] == "cpu"
    with pytest.raises(ValueError, match="no MKL"):
        choose_kernels("stock", torch.device("cpu"))


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="'auto' or one of"):
        choose_kernels("warp", torch.device("cpu"))
    with pytest.raises(ValueError, match="it is for processors"):
        choose_kernels("cpu", torch.device("meta"))
