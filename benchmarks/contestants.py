"""Training steps of this library and of its peers, one callable each.

Each does what its library's own loop does for one batch, without loading data and logging:

- saefeat: `BankLearner.step` with a bank of one dictionary.
- sae-lens: what `SAETrainer.fit` calls for a batch: `step` (forward, loss, backward, clipping,
  Adam, firing counts), then its counters. "sae-lens-autocast" is the same with `autocast=True`.
- dictionary-learning: `update` of the trainer for that kind. It is handed step numbers from 0, so
  that the running mean of a threshold, which begins at step 1,000, is never paid for.
- sparsify: what the hook and the loop of its `Trainer` do for one hook point, with its default
  optimizer (schedule-free sign descent) and its default of no auxiliary loss. It has TopK alone.

Latents that are dead for long get an auxiliary loss in all of these; no step here reaches that.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from kinds import CONFIGS, PENALTY, sae_lens_dictionary
from torch import Tensor

from saefeat.core.devices import fastest_dtype
from saefeat.dictionaries.registry import dictionary_type
from saefeat.kernels.dispatch import choose_kernels
from saefeat.training.bank_learner import BankLearner

INSTALL = (
    "pip install --no-deps --target peers dictionary-learning==0.1.0 eai-sparsify==1.3.3 "
    "natsort schedulefree"
)
"""Brings the peers that are not among this library's extras; then PYTHONPATH=peers."""
PACKAGES = {
    "saefeat": "saefeat",
    "sae-lens": "sae-lens",
    "sae-lens-autocast": "sae-lens",
    "dictionary-learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
}
"""The package of each contestant."""
LONG = 100_000
"""Steps of the run that the measured steps are the first of."""

Step = Callable[[int], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What a step has to do."""

    kind: str
    """One of `kinds.CONFIGS`."""
    batches: Sequence[Float[Tensor, "n d_in"]]
    """Batches, taken in turn."""
    d_sae: int
    """Latents."""
    k: int
    """Latents on per token, or the L0 that a penalty is steered to."""
    initial_l0: float | None = None
    """L0 that a penalised dictionary here starts from; None is k, at which training ends."""

    @property
    def batch_size(self) -> int:
        """Rows in a batch."""
        return len(self.batches[0])

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.batches[0].shape[1]

    def batch(self, step: int) -> Float[Tensor, "n d_in"]:
        """The batch of a step."""
        return self.batches[step % len(self.batches)]


def version(contestant: str) -> str:
    """The version of a contestant's package.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        return importlib.metadata.version(PACKAGES[contestant])
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(f"{PACKAGES[contestant]} is not installed.") from error


def contestant(name: str, task: Task) -> Step | None:
    """The training step of the library called `name`; None if it has no such kind.

    Raises:
        ModuleNotFoundError: The library is not installed, or a package that it imports.
    """
    version(name)
    if name == "saefeat":
        return Saefeat(task)
    if name in ("sae-lens", "sae-lens-autocast"):
        return sae_lens_step(task, autocast=name.endswith("autocast"))
    if name == "dictionary-learning":
        return dictionary_learning_step(task)
    return sparsify_step(task) if task.kind == "topk" else None


class Saefeat:
    """This library's step; `l0` is what the last one measured."""

    def __init__(self, task: Task) -> None:
        if task.kind in PENALTY:
            initial = task.k if task.initial_l0 is None else task.initial_l0
            options = {"target_l0": float(task.k), "initial_l0": float(initial)}
        else:
            options = {"k": task.k}
        config = CONFIGS[task.kind](**options)
        device = torch.device("cpu")
        self.task = task
        self.learner = BankLearner(
            {("x", 1, 0): dictionary_type(config)(config, task.d_in, task.d_sae)},
            n_tokens=LONG * task.batch_size,
            n_steps=LONG,
            device=device,
            kernels=choose_kernels("auto", device)[1],
            selection_dtype=fastest_dtype(device),
        )
        self.l0 = float("nan")

    def __call__(self, step: int) -> None:
        measured = self.learner.step({"x": self.task.batch(step)})
        self.l0 = float(measured["x", 1, 0]["l0"])


def sae_lens_step(task: Task, *, autocast: bool) -> Step:
    """SAELens's."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    sae = sae_lens_dictionary(task.kind, task.d_in, task.d_sae, task.k)
    config = SAETrainerConfig(
        total_training_samples=LONG * task.batch_size,
        train_batch_size_samples=task.batch_size,
        # What its runner fills in; a constant schedule does not use it.
        lr_end=3e-5,
        autocast=autocast,
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(number: int) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(task.batch(number))
        trainer.n_training_steps += 1

    return step


def dictionary_learning_step(task: Task) -> Step | None:
    """dictionary_learning's."""
    if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
        # Its buffer of activations, which nothing here uses, imports nnsight and all it needs.
        stand_in: Any = types.ModuleType("nnsight")
        stand_in.LanguageModel = object
        sys.modules["nnsight"] = stand_in
    trainers = "dictionary_learning.trainers"
    homes = {
        "topk": ("top_k", "TopKTrainer"),
        "batch_topk": ("batch_top_k", "BatchTopKTrainer"),
        "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
        "standard": ("standard", "StandardTrainer"),
        "gated": ("gdm", "GatedSAETrainer"),
        "jumprelu": ("jumprelu", "JumpReluTrainer"),
    }
    if task.kind not in homes:
        return None
    module, name = homes[task.kind]
    options: dict[str, Any] = {}
    if task.kind in ("topk", "batch_topk", "matryoshka"):
        options["k"] = task.k
    if task.kind == "matryoshka":
        options["group_fractions"] = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]
    if task.kind == "jumprelu":
        options["target_l0"] = float(task.k)
    trainer = getattr(importlib.import_module(f"{trainers}.{module}"), name)(
        steps=LONG,
        activation_dim=task.d_in,
        dict_size=task.d_sae,
        layer=0,
        lm_name="none",
        seed=0,
        device="cpu",
        **options,
    )
    return lambda number: trainer.update(number, task.batch(number))


def sparsify_step(task: Task) -> Step:
    """sparsify's, of TopK."""
    # Its decoder is a Triton kernel wherever Triton can be imported, device or not.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    torch.manual_seed(0)
    coder = SparseCoder(task.d_in, SparseCoderConfig(num_latents=task.d_sae, k=task.k))
    rate = 5e-3 / (task.d_sae / 2**14) ** 0.5
    groups = [{"params": coder.parameters(), "lr": rate}]
    optimizer = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
    optimizer.train()
    did_fire = torch.zeros(task.d_sae, dtype=torch.bool)
    tokens_since_fired = torch.zeros(task.d_sae, dtype=torch.long)

    def update(number: int) -> None:
        x = task.batch(number)
        if number == 0:
            coder.b_dec.data = x.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=None, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        tokens_since_fired.add_(len(x))
        tokens_since_fired[did_fire] = 0
        did_fire.zero_()

    def step(number: int) -> None:
        # Its loop asks for this, of the whole process.
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            update(number)
        finally:
            torch.set_float32_matmul_precision(before)

    return step
