"""A training step waits for the device nowhere: by its operators, and on a GPU by CUDA's word."""

import pytest
import torch
from waiting import NothingWaits

from saefeat.kernels.autograd import sparse_decode, sparse_encode
from saefeat.kernels.codes import Codes, SparsityPattern
from saefeat.kernels.dispatch import choose_kernels

N, D, D_SAE, K = 12, 10, 20, 3

WAITING = {
    "a number": lambda x: float(x.sum()),
    "a condition": lambda x: bool((x > 0).any()),
    "a mask": lambda x: x[x > 0],
    "a mask to write by": lambda x: x.index_put_((x > 0,), torch.zeros(())),
    "indices of a mask": lambda x: (x > 0).nonzero(),
    "a selection": lambda x: x.masked_select(x > 0),
    "counts": lambda x: torch.bincount(x.long()),
    "a comparison": lambda x: torch.equal(x, x + 1),
    "distinct values": lambda x: x.unique(),
    "repeats": lambda x: torch.repeat_interleave(x, x.long()),
    "a solution": lambda x: torch.linalg.solve(torch.eye(4), x),
}


@pytest.mark.parametrize("case", WAITING)
def test_the_check_knows_what_waits(case):
    with NothingWaits(), pytest.raises(RuntimeError, match="would wait for the device"):
        WAITING[case](torch.arange(4.0))


def kernels_on(name, device):
    try:
        return choose_kernels(name, torch.device(device))[1]
    except ValueError as error:
        pytest.skip(str(error))


def train_step(selection, kernels, x, parameters):
    """What a step of a TopK or BatchTopK dictionary runs of the kernels, and its counts."""
    encoder, b_enc, decoder, b_dec = parameters
    with torch.no_grad():
        scores = ((x - b_dec) @ encoder.T + b_enc).bfloat16()
        if selection == "top_k":
            pattern = SparsityPattern.from_top_k(kernels.top_k(scores, K), D_SAE)
        else:
            pattern, _ = kernels.batch_top_k(scores, K * N)
    values = torch.relu(sparse_encode(kernels, pattern, x, encoder, b_enc, b_dec))
    codes = Codes(pattern, values)
    (x - sparse_decode(kernels, codes, decoder, b_dec)).square().sum().backward()
    return codes.firing_counts(), codes.row_counts(), kernels.latent_sums(pattern, values.detach())


def inputs(device, generator):
    x = torch.randn(N, D, generator=generator).to(device)
    shapes = (D_SAE, D), (D_SAE,), (D_SAE, D), (D,)
    parameters = [torch.randn(*shape, generator=generator).to(device) for shape in shapes]
    return x, [parameter.requires_grad_() for parameter in parameters]


STEPS = [("stock", "top_k"), ("triton", "top_k"), ("triton", "batch_top_k")]


@pytest.mark.parametrize(("name", "selection"), STEPS)
def test_no_operator_of_a_step_waits(name, selection, generator):
    kernels = kernels_on(name, "cpu")
    x, parameters = inputs("cpu", generator)
    with NothingWaits():
        train_step(selection, kernels, x, parameters)
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "selection"), STEPS)
def test_no_step_waits_on_a_gpu(name, selection, generator):
    kernels = kernels_on(name, "cuda")
    x, parameters = inputs("cuda", generator)
    train_step(selection, kernels, x, parameters)  # compiles, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(selection, kernels, x, parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
