"""Every backend computes what the reference does; the reference, what dense algebra says."""

import pytest
import torch

from saefeat.kernels.autograd import sparse_decode, sparse_encode
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


def ragged_pattern(generator: torch.Generator) -> SparsityPattern:
    """Rows of different lengths, the first, a middle and the last one empty."""
    dense = torch.rand(11, 17, generator=generator) < 0.3
    dense[[0, 5, 10]] = False
    return Codes.from_dense(dense.float()).pattern


def patterns(generator: torch.Generator):
    for n, d, d_sae, k in CASES.values():
        yield random_pattern(n, d_sae, k, generator), d
    yield ragged_pattern(generator), 6
    yield Codes.from_dense(torch.zeros(4, 9)).pattern, 5


@pytest.fixture(params=sorted(BACKENDS))
def backend(request):
    return BACKENDS[request.param]


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
    for k in (1, 7, 71):
        latents = backend.top_k(scores, k)
        assert latents.shape == (33, k)
        assert all(len(row.unique()) == k for row in latents)
        kept = scores.gather(1, latents).sort(dim=1, descending=True).values
        assert torch.equal(kept, scores.sort(dim=1, descending=True).values[:, :k])


def test_products_are_bitwise_repeatable(backend, generator):
    pattern = random_pattern(300, 500, 16, generator)
    values = torch.randn(len(pattern.latents), generator=generator)
    rows = torch.randn(300, 64, generator=generator)
    first = backend.transposed_product(pattern, values, rows)
    again = SparsityPattern(pattern.offsets, pattern.latents, pattern.d_sae)
    assert torch.equal(first, backend.transposed_product(again, values, rows))


def test_encode_and_decode_pass_gradcheck(backend, generator):
    pattern = ragged_pattern(generator)
    x = torch.randn(11, 6, generator=generator, dtype=torch.float64)

    def weight(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    encoder, b_enc, b_dec, decoder = weight(17, 6), weight(17), weight(6), weight(17, 6)

    def encode(encoder, b_enc, b_dec):
        return sparse_encode(backend, pattern, x, encoder, b_enc, b_dec)

    def decode(values, decoder, b_dec):
        return sparse_decode(backend, Codes(pattern, values), decoder, b_dec)

    assert torch.autograd.gradcheck(encode, (encoder, b_enc, b_dec))
    assert torch.autograd.gradcheck(decode, (weight(len(pattern.latents)), decoder, b_dec))


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


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="'auto' or one of"):
        choose_kernels("warp", torch.device("cpu"))
