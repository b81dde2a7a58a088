"""What a dictionary is given for a training step, and what it gives back.

Shape letters: n rows, d_out width of the target, d_sae latents.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from saefeat.core.distributed import ALONE, Ranks
from saefeat.kernels.codes import Codes
from saefeat.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a dictionary is handed besides its batch, for one training step."""

    kernels: Kernels
    """Backend of the sparse products."""
    scores: Float[Tensor, "n d_sae"] | None = None
    """Pre-activations of all latents in a short dtype, which only decide which latents are on.
    None where they have not been computed."""
    progress: float
    """Share of the training that is done, from 0 to 1."""
    variance: Float[Tensor, ""]
    """Sum over the batch of the target's squared distance to its mean, the unit of the loss."""
    dead: Int[Tensor, " n_dead"]
    """Latents that have not fired for `dead_after_tokens`."""
    ranks: Ranks = ALONE
    """The processes that hold parts of the batch; losses are a part's share of that of all."""
    n_rows: int | None = None
    """Rows of the whole batch, where they are divided among processes."""

    feature_ranks: Ranks = ALONE
    """The processes that hold parts of the latents, each with the whole batch."""
    n_dead: int | None = None
    """Dead latents of all of them; None where this process has all latents."""

    @property
    def scored_by(self) -> Ranks:
        """The processes that have parts of the scores of a batch, by rows or by latents."""
        return self.feature_ranks if self.feature_ranks.size > 1 else self.ranks

    @property
    def n_dead_whole(self) -> int:
        """Dead latents, in whichever process."""
        return len(self.dead) if self.n_dead is None else self.n_dead

    def n_whole(self, n: int) -> int:
        """Rows of the whole batch, of which this process has n."""
        return n if self.n_rows is None else self.n_rows


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """What a training step minimises, and what it logs."""

    total: Float[Tensor, ""]
    """The loss; its gradient trains the dictionary."""
    terms: dict[str, Tensor]
    """Detached 0-d parts of it by name, for the log."""
    codes: Codes
    """The codes of the batch, for counting which latents fired."""
    residual: Float[Tensor, "n d_out"]
    """What the reconstruction left over, detached, for restarting dead latents at it."""
