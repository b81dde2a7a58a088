"""`across_widths`: what became of the latents of a narrow dictionary in a wider one.

Shape letters: w_narrow and w_wide latents.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saefeat.activations.stream import ActivationStream
from saefeat.core.progress import progress_bar
from saefeat.dictionaries.base import Dictionary
from saefeat.superposition.diagnostics.co_activation import CoActivation
from saefeat.superposition.diagnostics.splitting import Splits, splits


@dataclass(frozen=True, kw_only=True, slots=True)
class AcrossWidths:
    """Splitting and merging between two widths. `print` it."""

    hook_name: str
    n_tokens: int
    split: Splits = field(repr=False)
    """For each narrow latent, the wider ones among which its rows are divided."""
    merged: Splits = field(repr=False)
    """The other way round: for each wide latent, the narrow ones among which its rows are."""
    fires: tuple[Bool[Tensor, " w_narrow"], Bool[Tensor, " w_wide"]] = field(repr=False)
    """Which latents were on at all, of both."""

    def descendants(self, latent: int) -> Int[Tensor, " n"]:
        """The wide latents that `latent` became, the one that has most of its rows first.

        Those that point its way and fire within its rows: several where it was split, one where it
        was kept. Where there are none, the one that it was merged into if there is one.
        """
        own = self.split.children[self.split.parents == latent]
        return own if len(own) else self.merged.parents[self.merged.children == latent]

    @property
    def is_split(self) -> Bool[Tensor, " w_narrow"]:
        """Narrow latents that have become several."""
        return self.split.is_split

    @property
    def is_merged(self) -> Bool[Tensor, " w_narrow"]:
        """Narrow latents that have become one with others: children of a wide latent whose rows
        are divided among several."""
        children = self.merged.children[self.merged.is_split[self.merged.parents]]
        return torch.isin(torch.arange(len(self.fires[0])), children)

    @property
    def is_lost(self) -> Bool[Tensor, " w_narrow"]:
        """Narrow latents that fire, and have no descendant."""
        found = torch.cat([self.split.parents, self.merged.children])
        return self.fires[0] & ~torch.isin(torch.arange(len(self.fires[0])), found)

    @property
    def is_kept(self) -> Bool[Tensor, " w_narrow"]:
        """Narrow latents that fire and are neither split, merged nor lost."""
        return self.fires[0] & ~(self.is_split | self.is_merged | self.is_lost)

    @property
    def is_new(self) -> Bool[Tensor, " w_wide"]:
        """Wide latents that fire, and descend from no narrow one."""
        found = torch.cat([self.split.children, self.merged.parents])
        return self.fires[1] & ~torch.isin(torch.arange(len(self.fires[1])), found)

    def __str__(self) -> str:
        n_narrow, n_wide = (int(one.sum()) for one in self.fires)
        parts = [
            f"{int(getattr(self, f'is_{name}').sum()):,} {name}"
            for name in ("kept", "split", "merged", "lost")
        ]
        return (
            f"{self.hook_name}: {n_narrow:,} latents that fire on {self.n_tokens:,} tokens in "
            f"{n_wide:,} of a wider dictionary\n  {', '.join(parts)} (a latent may be split and "
            f"merged); {int(self.is_new.sum()):,} of the wider are new"
        )


@torch.no_grad()
def across_widths(
    narrow: Dictionary,
    wide: Dictionary,
    stream: ActivationStream,
    *,
    n_tokens: int = 100_000,
    cosine: float = 0.5,
    within: float = 0.5,
    most: float = 0.9,
    progress: bool = True,
) -> AcrossWidths:
    """Find for each latent of a narrow dictionary its descendants in a wider one.

    Args:
        narrow: The dictionary with fewer latents.
        wide: One with more, of the same activations.
        stream: Its held-out rows are read.
        n_tokens: Rows to read at most.
        cosine: Least cosine between the directions of a latent and its descendant.
        within: Least probability that the one is on where the other, more specific one is.
        most: A latent is split, or merged, if none of its descendants is on in so many of its rows.
        progress: Whether to draw a progress bar on standard error.

    Raises:
        KeyError: The stream lacks the hook.
        ValueError: The dictionaries are not of one hook, `wide` has fewer latents, or an option is
            out of range.
    """
    if narrow.hook_name != wide.hook_name or narrow.d_out != wide.d_out:
        raise ValueError(
            f"Widths are compared at one hook, got {narrow.hook_name!r} and {wide.hook_name!r}, "
            f"widths {narrow.d_out} and {wide.d_out}. Compare hooks and models by universality."
        )
    if narrow.d_sae > wide.d_sae:
        raise ValueError(
            f"The narrow dictionary has {narrow.d_sae} latents and the wide one {wide.d_sae}. "
            "Were they exchanged?"
        )
    if narrow.hook_name not in stream.hooks:
        raise KeyError(
            f"The stream has no hook {narrow.hook_name!r}; it has {', '.join(stream.hooks)}."
        )
    counts = CoActivation(narrow.d_sae, wide.d_sae)
    bar = progress_bar(
        total=min(n_tokens, stream.n_held_out_rows), unit="tok", desc="encoding", shown=progress
    )
    for batch in stream.held_out_batches(n_tokens):
        x = batch[narrow.hook_name].to(narrow.W_dec.device).float()
        counts.update(narrow.encode(x), wide.encode(x.to(wide.W_dec.device)))
        bar.update(len(x))
    bar.close()
    both = narrow.W_dec.detach(), wide.W_dec.detach()
    divided = partial(splits, cosine=cosine, within=within, most=most)
    return AcrossWidths(
        hook_name=narrow.hook_name,
        n_tokens=counts.n_rows,
        split=divided(counts, both[0], both[1]),
        merged=divided(counts.exchanged, both[1], both[0]),
        fires=(counts.firing > 0, counts.other_firing > 0),
    )
