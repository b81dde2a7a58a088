"""What training a dictionary takes, worked out from its sizes; kinds override what differs.

Shape letters: n rows in a batch, nnz entries of the sparse codes of all of them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saefeat.dictionaries.base import DictionaryConfig

ENTRY_BYTES = 70
"""Of a stored entry of the codes: its place, its value and gradient, and the order by latent."""


class Costs:
    """Memory and operations of a step and of initialisation. Weights and the batch are not in it.

    Only sizes are looked at, so that the weights may be on the meta device.
    """

    config: "DictionaryConfig"
    d_in: int
    d_out: int
    d_sae: int

    @property
    def entries_per_row(self) -> float:
        """Entries of the codes that a token is expected to have in a step.

        The `k` of the config; a kind that has none may keep all of them on.
        """
        return float(getattr(self.config, "k", self.d_sae))

    @property
    def n_reconstructions(self) -> int:
        """Reconstructions that a step holds at once."""
        return 1

    @property
    def flops_per_entry(self) -> int:
        """It is read with its gradient (4 d_in), decoded, and gives some to code and atom."""
        return 4 * self.d_in + 6 * self.d_out

    def step_flops(self, n: int) -> float:
        """Operations of a step on n rows, multiplications and additions each as one.

            2 n d_in d_sae + nnz flops_per_entry

        The first term is the one dense product, in a short dtype. Adam, whose work does not grow
        with n, and the auxiliary loss are not counted.
        """
        return 2.0 * n * self.d_in * self.d_sae + n * self.entries_per_row * self.flops_per_entry

    def step_bytes(self, n: int) -> int:
        """Memory that comes and goes in a step on n rows."""
        # Rows less their mean, rows less b_dec, a residual, and the reconstructions.
        rows = 2 * self.d_in + (self.n_reconstructions + 1) * self.d_out
        return 4 * n * rows + ENTRY_BYTES * int(n * self.entries_per_row)

    def lasting_bytes(self, n: int) -> int:
        """What it keeps between steps on n rows, or makes anew each time at the same size."""
        return 0

    def initial_bytes(self, n: int) -> int:
        """What it takes to draw the first weights, with n rows to look at."""
        return 4 * 2 * self.d_sae * self.d_out
