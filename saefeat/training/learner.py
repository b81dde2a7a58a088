"""One dictionary while it learns: its optimizer, its schedule and its dead latents."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from saefeat.dictionaries.base import Dictionary, StepContext
from saefeat.kernels.dispatch import Kernels
from saefeat.training.dead_latents import DeadLatents, patience_tokens
from saefeat.training.schedules import learning_rate_factor, peak_learning_rate

STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 16}
"""Steps between looks at results on which something in Python depends (which latents are dead,
whether the loss is finite). A GPU stands still until it has been looked at."""


class Learner:
    """Makes the training steps of one dictionary on scaled activations."""

    def __init__(
        self,
        dictionary: Dictionary,
        *,
        n_tokens: int,
        n_steps: int,
        kernels: Kernels,
    ) -> None:
        config = dictionary.config
        self.dictionary = dictionary
        self.n_steps = n_steps
        self.kernels = kernels
        self.peak_learning_rate = peak_learning_rate(
            config, dictionary.d_sae, n_steps, n_tokens / n_steps
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

    def step(
        self,
        x: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"],
        variance: Float[Tensor, ""],
        step: int,
        scores: Float[Tensor, "n d_sae"] | None = None,
    ) -> dict[str, Tensor | float]:
        """Learn from one batch.

        Args:
            x: Scaled activations.
            target: What to reconstruct; the same, but for transcoders.
            variance: Sum over the batch of the target's squared distance to its mean.
            step: Number of the step, from 0.
            scores: See `StepContext`.

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
        loss = dictionary.training_loss(
            x,
            target,
            StepContext(
                kernels=self.kernels,
                scores=scores,
                progress=step / self.n_steps,
                variance=variance,
                dead=self.dead_latents,
            ),
        )
        loss.total.backward()
        dictionary.drop_parallel_gradient()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        dictionary.normalise_decoder()
        self.dead.update(loss.codes)
        restarts = dictionary.restarts_dead_latents and not config.freeze_decoder
        if restarts and self._restart_is_due(step, len(x)):
            self._restart(x, loss.residual)
        return {
            "loss": loss.total.detach(),
            **loss.terms,
            "l0": (loss.codes.values > 0).sum() / len(x),
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
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            ValueError: A tensor is missing, or of another shape.
        """
        try:
            for name, own in self.dictionary.state_dict().items():
                _copy_whole(own, state[f"dictionary.{name}"])
            for name, parameter in self.dictionary.named_parameters():
                moments = {"step": torch.zeros((), device=parameter.device)}
                for moment in ("exp_avg", "exp_avg_sq"):
                    moments[moment] = torch.zeros_like(parameter)
                for moment, value in moments.items():
                    _copy_whole(value, state[f"adam.{moment}.{name}"])
                self.optimizer.state[parameter] = moments
            _copy_whole(self.dead.tokens_since_fired, state["tokens_since_fired"])
            self.dead_latents = state["dead_latents"].to(self.dead_latents.device)
            self.generator.set_state(state["generator"])
        except KeyError as error:
            raise ValueError(f"it lacks the tensor {error}") from error

    def _restart_is_due(self, step: int, n_rows: int) -> bool:
        """Once every patience, while enough of the run is left to learn in."""
        period = max(1, self.dead.patience // n_rows)
        decay = self.dictionary.config.decay_fraction
        return (step + 1) % period == 0 and step < (1 - decay) * self.n_steps

    @torch.no_grad()
    def _restart(self, x: Float[Tensor, "n d_in"], residual: Float[Tensor, "n d_out"]) -> None:
        """Point dead latents at residuals, drawn with probability proportional to their error.

        Bricken et al. 2023 (resampling); Adam's memory of the old directions goes with them.
        """
        dead = self.dead.latents
        error = residual.square().sum(1)
        dead = dead[: int((error > 0).sum())]
        if len(dead) == 0:
            return
        rows = torch.multinomial(error, len(dead), generator=self.generator)
        directions = residual[rows] / error[rows].sqrt()[:, None]
        self.dictionary.restart(dead, directions, x[rows])
        for name, parameter in self.dictionary.named_parameters():
            if name != "b_dec":  # the one parameter that is not latent by latent
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[parameter][moment][dead] = 0.0
        self.dead.tokens_since_fired[dead] = 0


def _copy_whole(own: Tensor, saved: Tensor) -> None:
    if own.shape != saved.shape:
        raise ValueError(f"it has {list(saved.shape)} where {list(own.shape)} was expected")
    own.copy_(saved)
