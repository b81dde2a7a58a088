"""One dictionary while it learns: its optimizer, its schedule and its dead latents."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.core.distributed import ALONE, Ranks
from saefeat.dictionaries.base import Dictionary
from saefeat.dictionaries.step import StepContext
from saefeat.kernels.codes import Codes
from saefeat.kernels.dispatch import Kernels
from saefeat.training.dead_latents import DeadLatents, patience_tokens
from saefeat.training.schedules import learning_rate_factor, peak_learning_rate

STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 16}
"""Steps between looks at results on which something in Python depends (which latents are dead,
whether the loss is finite). A GPU stands still until it has been looked at."""


MOST_TERMS = 16
"""Measured numbers that travel with a gradient at most."""


class Learner:
    """Makes the training steps of one dictionary on scaled activations."""

    def __init__(
        self,
        dictionary: Dictionary,
        *,
        n_tokens: int,
        n_steps: int,
        kernels: Kernels,
        feature_ranks: Ranks = ALONE,
    ) -> None:
        config = dictionary.config
        self.feature_ranks = feature_ranks
        self.dictionary = dictionary
        self.n_steps = n_steps
        self.kernels = kernels
        self.peak_learning_rate = peak_learning_rate(
            config, dictionary.d_sae * feature_ranks.size, n_steps, n_tokens / n_steps
        )
        self.generator = torch.Generator(dictionary.W_dec.device)
        self.generator.manual_seed(dictionary.origin.seed or 0)
        for parameter in dictionary.parameters():
            # Kept for the whole run: see `kernels.autograd`.
            parameter.grad = torch.zeros_like(parameter)
        frozen = {"W_dec": config.freeze_decoder, "b_dec": config.freeze_offset}
        factors = dictionary.rate_factors | {name: 0.0 for name in frozen if frozen[name]}
        self.optimizer = torch.optim.Adam(
            [
                {"params": [parameter], "factor": factors.get(name, 1.0)}
                for name, parameter in dictionary.named_parameters()
            ],
            lr=0.0,
            betas=config.adam_betas,
            fused=True,
        )
        device = dictionary.W_dec.device
        self.dead = DeadLatents(dictionary.d_sae, patience_tokens(config, n_tokens), device)
        self.dead_latents = self.dead.latents
        self.steps_between_looks = STEPS_BETWEEN_LOOKS.get(device.type, 1)
        self._shared: Tensor | None = None

    def step(
        self,
        x: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"],
        variance: Float[Tensor, ""],
        step: int,
        scores: Float[Tensor, "n d_sae"] | None = None,
        ranks: Ranks = ALONE,
        n_rows: int | None = None,
    ) -> dict[str, Tensor | float]:
        """Learn from one batch.

        Args:
            x: Scaled activations.
            target: What to reconstruct; the same, but for transcoders.
            variance: Sum over the batch of the target's squared distance to its mean.
            step: Number of the step, from 0.
            scores: See `StepContext`.
            ranks: The processes that hold parts of the batch.
            n_rows: Rows of the whole batch; None for those given.

        Returns:
            The loss and its terms, L0, the share of dead latents and the learning rate; what is
            measured stays on the device.
        """
        dictionary, config = self.dictionary, self.dictionary.config
        learning_rate = self.peak_learning_rate * learning_rate_factor(
            step,
            self.n_steps,
            warmup_fraction=config.warmup_fraction,
            decay_fraction=config.decay_fraction,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]
        if step % self.steps_between_looks == 0:
            self.dead_latents = self.dead.latents
        if ranks.size > 1 and self._shared is None:
            self._shared = self._join_gradients()
        loss = dictionary.training_loss(
            x,
            target,
            StepContext(
                kernels=self.kernels,
                scores=scores,
                progress=step / self.n_steps,
                variance=variance,
                dead=self.dead_latents,
                ranks=ranks,
                n_rows=n_rows,
                feature_ranks=self.feature_ranks,
                n_dead=self._n_dead_of_all(),
            ),
        )
        loss.total.backward()
        n_rows = len(x) if n_rows is None else n_rows
        measured = {
            "loss": loss.total.detach(),
            **loss.terms,
            "l0": (loss.codes.values > 0).sum() / n_rows,
        }
        if ranks.size > 1:
            measured = self._add_up(loss.codes, measured, ranks, n_rows)
        else:
            self.dead.update(loss.codes)
        dictionary.drop_parallel_gradient()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        dictionary.normalise_decoder()
        restarts = dictionary.restarts_dead_latents and not config.freeze_decoder
        if restarts and self._restart_is_due(step, n_rows):
            self._restart(x, loss.residual, ranks, n_rows)
        return {
            **measured,
            "dead_fraction": len(self.dead_latents) / dictionary.d_sae,
            "learning_rate": learning_rate,
        }

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, as tensors that share memory with it."""
        state = {f"dictionary.{name}": one for name, one in self.dictionary.state_dict().items()}
        for name, parameter in self.dictionary.named_parameters():
            for moment, value in self.optimizer.state[parameter].items():
                state[f"adam.{moment}.{name}"] = value
        state["tokens_since_fired"] = self.dead.tokens_since_fired
        state["dead_latents"] = self.dead_latents
        state["generator"] = self.generator.get_state()
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Go on from what `state` gave, one tensor after the other.

        Args:
            state: It.
            prefix: What stands before each name there.

        Raises:
            ValueError: A tensor is missing, or of another shape or dtype.
        """
        for name, own in self.dictionary.state_dict().items():
            own.copy_(saved(state, f"{prefix}dictionary.{name}", own))
        for name, parameter in self.dictionary.named_parameters():
            moments = {"step": torch.zeros((), device=parameter.device)}
            for moment in ("exp_avg", "exp_avg_sq"):
                moments[moment] = torch.zeros_like(parameter)
            for moment, value in moments.items():
                value.copy_(saved(state, f"{prefix}adam.{moment}.{name}", value))
            self.optimizer.state[parameter] = moments
        since_fired = self.dead.tokens_since_fired
        since_fired.copy_(saved(state, f"{prefix}tokens_since_fired", since_fired))
        generator = self.generator.get_state()
        self.generator.set_state(saved(state, f"{prefix}generator", generator))
        # Those of the last look, which is not the last step on a GPU.
        dead = state.get(f"{prefix}dead_latents", torch.empty(0, 0))
        known = torch.arange(self.dictionary.d_sae)
        if dead.ndim != 1 or dead.dtype != known.dtype or not torch.isin(dead.cpu(), known).all():
            raise ValueError("its dead_latents are no latents")
        self.dead_latents = dead.to(self.dead_latents.device)

    def _n_dead_of_all(self) -> int | None:
        """Dead latents of all processes that have parts of the latents; None where there is one."""
        if self.feature_ranks.size == 1:
            return None
        return int(self.feature_ranks.sum(torch.tensor(len(self.dead_latents))))

    def _join_gradients(self) -> Tensor:
        """Puts all gradients into one piece of memory, with room for what travels with them.

        One collective then adds up what one step gave, and nothing is copied for it.
        """
        parameters = list(self.dictionary.parameters())
        sizes = [one.numel() for one in parameters]
        n_more = self.dictionary.d_sae + MOST_TERMS
        shared = torch.zeros(sum(sizes) + n_more, device=parameters[0].device)
        parts = shared.split([*sizes, n_more])
        for one, part in zip(parameters, parts, strict=False):
            one.grad = part.view_as(one)
        return shared

    @torch.no_grad()
    def _add_up(
        self, codes: Codes, measured: dict[str, Tensor], ranks: Ranks, n_rows: int
    ) -> dict[str, Tensor]:
        """Makes gradients, dead latents and what was measured those of the whole batch."""
        assert self._shared is not None
        firing, terms = self._shared[-(self.dictionary.d_sae + MOST_TERMS) :].split(
            [self.dictionary.d_sae, MOST_TERMS]
        )
        firing.copy_(codes.firing_counts())
        terms[: len(measured)] = torch.stack(list(measured.values()))
        ranks.sum(self._shared)
        self.dead.note_firing(firing > 0, n_rows)
        return dict(zip(measured, terms.clone(), strict=False))

    def _restart_is_due(self, step: int, n_rows: int) -> bool:
        """Once every patience, while enough of the run is left to learn in."""
        period = max(1, self.dead.patience // n_rows)
        decay = self.dictionary.config.decay_fraction
        return (step + 1) % period == 0 and step < (1 - decay) * self.n_steps

    @torch.no_grad()
    def _restart(
        self,
        x: Float[Tensor, "n d_in"],
        residual: Float[Tensor, "n d_out"],
        ranks: Ranks,
        n_rows: int,
    ) -> None:
        """Point dead latents at residuals, drawn with probability proportional to their error.

        Bricken et al. 2023 (resampling); Adam's memory of the old directions goes with them.
        """
        dead = self.dead.latents
        error = ranks.whole(residual.square().sum(1, keepdim=True), n_rows).squeeze(1)
        dead = dead[: int((error > 0).sum())]
        if len(dead) == 0:
            return
        rows = torch.multinomial(error, len(dead), generator=self.generator)
        directions = ranks.rows(residual, rows, n_rows) / error[rows].sqrt()[:, None]
        self.dictionary.restart(dead, directions, ranks.rows(x, rows, n_rows))
        for name, parameter in self.dictionary.named_parameters():
            if name != "b_dec":  # the one parameter that is not latent by latent
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[parameter][moment][dead] = 0.0
        self.dead.tokens_since_fired[dead] = 0


def saved(state: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A tensor of a checkpoint.

    Raises:
        ValueError: It is missing, or of another shape or dtype than `like`.
    """
    found = state.get(name)
    if found is None:
        raise ValueError(f"it lacks the tensor {name!r}")
    if found.shape != like.shape or found.dtype != like.dtype:
        raise ValueError(
            f"it has {list(found.shape)} of {found.dtype} as {name!r}, where {list(like.shape)} of "
            f"{like.dtype} was expected"
        )
    return found
