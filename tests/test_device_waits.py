"""A training step waits for the device nowhere: by its operators, and on a GPU by CUDA's word."""

import pytest
import torch
from waiting import NothingWaits

import saefeat as sf
from saefeat.dictionaries.registry import dictionary_type
from saefeat.kernels.dispatch import choose_kernels
from saefeat.training.learner import Learner

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


def learner_on(device, config, kernels):
    """A dictionary in the middle of its training, at a step at which nothing is looked at."""
    dictionary = dictionary_type(config)(config, D, D_SAE).to(device)
    dictionary.initialise(
        torch.Generator().manual_seed(0), torch.zeros(D), torch.randn(N, D), torch.randn(N, D)
    )
    learner = Learner(dictionary, n_tokens=10_000, n_steps=1_000, kernels=kernels)
    learner.steps_between_looks = 16
    learner.dead_latents = torch.tensor([1, 5], device=device)  # so that AuxK takes part
    return learner


def train_step(learner, x):
    target = x
    variance = torch.linalg.vector_norm(x - x.mean(0)).square()
    return learner.step(x, target, variance, step=3)


STEPS = [
    ("stock", sf.TopKConfig(k=K)),
    ("triton", sf.TopKConfig(k=K)),
    ("triton", sf.BatchTopKConfig(k=K)),
]


@pytest.mark.parametrize(("name", "config"), STEPS)
def test_no_operator_of_a_step_waits(name, config, generator):
    learner = learner_on("cpu", config, kernels_on(name, "cpu"))
    before = learner.dictionary.encoder.clone()
    with NothingWaits():
        train_step(learner, torch.randn(N, D, generator=generator))
    assert not torch.equal(before, learner.dictionary.encoder)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "config"), STEPS)
def test_no_step_waits_on_a_gpu(name, config, generator):
    learner = learner_on("cuda", config, kernels_on(name, "cuda"))
    x = torch.randn(N, D, generator=generator).to("cuda")
    train_step(learner, x)  # compiles, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(learner, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
