"""What the Triton kernels promise beyond what `test_every_kernel` asks of every backend.

Without a GPU, Triton's interpreter runs the programs, and its compiler still compiles them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saefeat.kernels import dispatch, eager
from saefeat.kernels.codes import Codes, SparsityPattern
from saefeat.kernels.dispatch import choose_kernels, load_kernels

pytest.importorskip("triton", reason="needs triton: pip install triton")
# Now, under the environment that conftest sets: it decides whether programs are interpreted.
load_kernels("triton")

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("where there is a GPU, the programs run on it")
    return request.param


@pytest.fixture
def kernels(device):
    return choose_kernels("triton", torch.device(device))[1]


@pytest.fixture
def in_pieces(kernels, monkeypatch):
    """The kernels, their loops cut so that small inputs go round them several times."""
    for name in ("ENTRIES", "COLUMNS", "SCANNED"):
        monkeypatch.setattr(kernels, name, 16)
    monkeypatch.setattr(kernels, "WINDOW", 4)
    return kernels


def hard_pattern(device):
    """Empty rows, a latent that is on in almost every row, several that never are."""
    mask = torch.rand(45, 12, generator=torch.Generator().manual_seed(1)) < 0.2
    mask[:, 3] = True
    mask[[0, 20, 44]] = False
    mask[:, [0, 7, 11]] = False
    return SparsityPattern.from_mask(mask.to(device))


@pytest.mark.parametrize("dtype", FLOATS)
def test_products_round_only_their_results(in_pieces, device, dtype, generator):
    pattern = hard_pattern(device)
    left = torch.randn(45, 37, generator=generator).to(device, dtype)
    right = torch.randn(12, 37, generator=generator).to(device, dtype)
    values = torch.randn(len(pattern.latents), generator=generator).to(device, dtype)
    exact = [tensor.double() for tensor in (values, left, right)]
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)

    def check(got, expected):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=rtol * 1e-2)

    check(
        in_pieces.sampled_product(pattern, left, right), eager.sampled_product(pattern, *exact[1:])
    )
    check(in_pieces.product(pattern, values, right), eager.product(pattern, exact[0], exact[2]))
    check(
        in_pieces.transposed_product(pattern, values, left),
        eager.transposed_product(pattern, *exact[:2]),
    )
    check(in_pieces.latent_sums(pattern, values), eager.latent_sums(pattern, exact[0]))


def test_products_read_columns_and_repeated_rows_as_they_are(kernels, device, generator):
    pattern = hard_pattern(device)
    left = torch.randn(9, 45, generator=generator).to(device).T  # columns side by side
    right = torch.randn(1, 9, generator=generator).to(device).expand(12, 9)
    values = torch.randn(1, generator=generator).to(device).expand(len(pattern.latents))
    for name, arguments in (
        ("sampled_product", (left, right)),
        ("product", (values, right)),
        ("transposed_product", (values, left)),
    ):
        got = getattr(kernels, name)(pattern, *arguments)
        torch.testing.assert_close(got, getattr(eager, name)(pattern, *arguments))


def test_everything_repeats_to_the_last_bit(in_pieces, device, generator):
    scores = torch.randn(20, 12, generator=generator).to(device)
    left = torch.randn(20, 17, generator=generator).to(device)

    def run():
        pattern, least = in_pieces.batch_top_k(scores, 60)
        values = in_pieces.sampled_product(pattern, left, left[:12])
        return (
            in_pieces.top_k(scores, 5),
            pattern.latents,
            least,
            values,
            in_pieces.transposed_product(pattern, values, left),
            in_pieces.latent_sums(pattern, values),
        )

    for first, again in zip(run(), run(), strict=True):
        assert torch.equal(first, again)


def rows_of_every_sort(dtype, generator):
    scores = torch.randn(8, 41, generator=generator).to(dtype)
    scores[1] = scores[0]  # the same row twice
    scores[2] = 0.5  # all equal
    scores[3, ::2] = scores[3, 0]  # many equal
    scores[4] = -scores[4].abs()
    scores[5] = 0
    scores[5, 1::2] = -0.0
    scores[6, 10] = torch.inf
    scores[6, 11:] = -torch.inf
    return scores


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [1, 20, 41])
def test_top_k_keeps_the_first_of_equals_in_order(in_pieces, device, dtype, k, generator):
    scores = rows_of_every_sort(dtype, generator).to(device)
    got = in_pieces.top_k(scores, k)
    stable = (scores + 0.0).sort(dim=1, descending=True, stable=True)
    assert torch.equal(
        scores.gather(1, got).sort(dim=1, descending=True).values, stable.values[:, :k]
    )
    # Zeros of both signs are equal to torch, and only there may it choose others.
    rows = [row for row in range(8) if row != 5]
    assert torch.equal(got[rows], stable.indices[rows, :k].sort(dim=1).values)


def test_top_k_keeps_what_is_not_a_number(kernels, device):
    scores = torch.tensor([[1.0, torch.nan, torch.inf, -torch.nan, 2.0]], device=device)
    assert kernels.top_k(scores, 2).tolist() == [[1, 3]]
    assert kernels.top_k(scores, 3).tolist() == [[1, 2, 3]]


def test_rows_may_lie_apart(kernels, device, generator):
    scores = torch.randn(6, 40, generator=generator).to(device)[:, 3:20]
    assert torch.equal(kernels.top_k(scores, 4), kernels.top_k(scores.contiguous(), 4))
    across = torch.randn(17, 6, generator=generator).to(device).T
    assert torch.equal(kernels.top_k(across, 4), kernels.top_k(across.contiguous(), 4))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_kept", [1, 90])
def test_batch_top_k_keeps_the_largest_positive_entries(
    in_pieces, device, dtype, n_kept, generator
):
    scores = torch.randn(6, 41, generator=generator).to(device, dtype)
    scores[2] = -1  # a row that keeps nothing
    pattern, least = in_pieces.batch_top_k(scores, n_kept)
    kept = scores[pattern.rows, pattern.latents]
    expected = scores.flatten().sort(descending=True).values[:n_kept]
    assert len(kept) == n_kept
    assert torch.equal(kept.relu().sort(descending=True).values, expected.relu())
    assert float(least) == float(expected[expected > 0].min())
    dense = Codes(pattern, torch.ones_like(kept)).to_dense()
    assert int(dense.sum()) == n_kept  # none twice


def test_batch_top_k_agrees_with_the_reference_where_none_are_equal(kernels, device, generator):
    scores = torch.randperm(9 * 53, generator=generator).reshape(9, 53).float().to(device) - 100
    pattern, least = kernels.batch_top_k(scores, 77)
    expected, expected_least = eager.batch_top_k(scores, 77)
    assert torch.equal(pattern.offsets, expected.offsets)
    assert torch.equal(pattern.latents, expected.latents)
    assert torch.equal(least, expected_least)


def test_batch_top_k_cuts_through_equals_in_row_major_order(in_pieces, device):
    scores = torch.zeros(4, 30, device=device)
    scores[0, 29] = scores[1, :20] = scores[3, 5] = 2.0
    scores[2, 7] = 3.0
    pattern, least = in_pieces.batch_top_k(scores, 12)
    assert pattern.offsets.tolist() == [0, 1, 11, 12, 12]
    assert pattern.latents.tolist() == [29, *range(10), 7]
    assert float(least) == 2.0


@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_top_k_fills_up_with_entries_that_are_off(in_pieces, device, dtype):
    scores = -torch.ones(4, 30, device=device, dtype=dtype)
    _, least = in_pieces.batch_top_k(scores, 12)
    _, expected = eager.batch_top_k(scores, 12)
    assert torch.equal(least, expected)
    scores[2, 3] = 0.25
    pattern, least = in_pieces.batch_top_k(scores, 12)
    codes = Codes(pattern, scores[pattern.rows, pattern.latents].relu())
    assert len(codes.latents) == 12
    assert codes.firing_counts().nonzero().tolist() == [[3]]
    assert float(least) == 0.25


@pytest.mark.parametrize("dtype", FLOATS)
def test_above_finds_what_the_reference_does(in_pieces, device, dtype, generator):
    scores = rows_of_every_sort(dtype, generator).to(device)
    scores[7, 0] = torch.nan
    floor = torch.randn(41, generator=generator).to(device)
    floor[:10] = scores[0, :10].float() + 1e-4  # casts to the score itself where it is coarse
    for each in (floor, torch.full_like(floor, torch.inf), torch.full_like(floor, -torch.inf)):
        got, expected = in_pieces.above(scores, each), eager.above(scores, each)
        assert torch.equal(got.offsets, expected.offsets)
        assert torch.equal(got.latents, expected.latents)


def test_no_entries_and_no_rows_are_allowed(kernels, device):
    weight = torch.ones(7, 3, device=device)
    for n in (0, 4):
        pattern = kernels.above(torch.zeros(n, 7, device=device), torch.ones(7, device=device))
        values, rows = torch.zeros(0, device=device), torch.ones(n, 3, device=device)
        assert len(kernels.sampled_product(pattern, rows, weight)) == 0
        assert torch.equal(kernels.product(pattern, values, weight), torch.zeros_like(rows))
        sums = kernels.transposed_product(pattern, values, rows)
        assert torch.equal(sums, torch.zeros_like(weight))
        assert kernels.top_k(torch.zeros(n, 7, device=device), 2).shape == (n, 2)


def far_apart(matrix):
    """The same three rows, 2**30 and a few entries apart.

    An offset that wraps around falls into the first half of the room, where nothing is written.
    Only the pages of the rows are ever touched.
    """
    stride = 2**30 + 8
    try:
        room = torch.empty(2**31 + 2 * stride + matrix.shape[1], dtype=matrix.dtype)
    except RuntimeError:
        pytest.skip("needs a system that promises 8.6 GB of memory; 20 KB are touched")
    return room.as_strided(matrix.shape, (stride, 1), 2**31).copy_(matrix)


def test_offsets_into_inputs_pass_two_to_the_thirty_first(device, generator):
    if device == "cuda":
        pytest.skip("it would take the device's memory; the programs are the same")
    kernels = choose_kernels("triton", torch.device(device))[1]
    near = torch.randn(3, 20, generator=generator).bfloat16()
    far = far_apart(near)
    pattern = SparsityPattern.from_top_k(torch.tensor([[0, 2], [1, 2], [2, 1]]), 3)
    values = torch.randn(6, generator=generator).bfloat16()
    floor = torch.zeros(20)
    assert torch.equal(kernels.top_k(far, 4), kernels.top_k(near, 4))
    assert torch.equal(
        kernels.batch_top_k(far, 9)[0].latents, kernels.batch_top_k(near, 9)[0].latents
    )
    assert torch.equal(kernels.above(far, floor).latents, kernels.above(near, floor).latents)
    for name, arguments in (
        ("sampled_product", lambda rows: (rows, rows)),
        ("product", lambda rows: (values, rows)),
        ("transposed_product", lambda rows: (values, rows)),
    ):
        kernel = getattr(kernels, name)
        assert torch.equal(kernel(pattern, *arguments(far)), kernel(pattern, *arguments(near)))


def test_programs_compile_for_a_gpu_and_multiply_rows_in_64_bits(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_programs.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compiled" in done.stdout


def test_only_by_name_does_the_interpreter_run():
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, nothing is interpreted")
    assert choose_kernels("triton", torch.device("cpu"))[0] == "triton"
    assert choose_kernels("auto", torch.device("cpu"))[0] != "triton"


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="it is for CUDA devices, and the device is cpu"):
        choose_kernels("triton", torch.device("cpu"))
    assert choose_kernels("auto", torch.device("cuda"))[0] == "triton"
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None if name == "triton" else name)
    with pytest.raises(ValueError, match="pip install triton"):
        choose_kernels("triton", torch.device("cuda"))
    assert choose_kernels("auto", torch.device("cuda"))[0] == "stock"
