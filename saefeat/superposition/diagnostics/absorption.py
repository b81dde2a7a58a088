"""Absorption: a latent for a general feature that is silent where a special one speaks for it.

Where "starts with S" and "snake" are always on together, an SAE saves a latent by putting the
direction of the first into the row of the second, and the latent for "starts with S" learns not
to fire on snakes (Chanin et al. 2024, arXiv:2409.14507).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array
from torch import Tensor

from saefeat.kernels.codes import Codes
from saefeat.superposition.diagnostics.co_activation import firing_pattern
from saefeat.superposition.directions import check_cosine, unit_rows
from saefeat.superposition.matching import assign


@dataclass(frozen=True, kw_only=True, slots=True)
class Absorption:
    """Where the latent of one general feature was silent though the feature was on."""

    latent: int
    """The latent of the general feature."""
    n_on: int
    """Rows in which the feature was on."""
    n_missed: int
    """Those of them in which its latent was off, and so was every copy of it."""
    n_absorbed: int
    """Those of the missed in which another latent stood in for it."""
    absorbers: dict[int, int]
    """In how many rows each such latent did, the most frequent first."""

    @property
    def rate(self) -> float:
        """Share of the feature's rows that other latents absorbed; nan where it never was on."""
        return self.n_absorbed / self.n_on if self.n_on else float("nan")


def absorption_of_feature(
    codes: Codes,
    decoder: Float[Tensor, "w d"],
    latent: int,
    direction: Float[Tensor, " d"],
    is_on: Bool[Tensor, " n"],
    *,
    cosine: float = 0.25,
    share: float = 0.5,
    same: float = 0.9,
) -> Absorption:
    """How often other latents carry a general feature's direction while its own latent is off.

    A row in which the feature is on and its latent off counts as absorbed if the latent that
    contributes most along the feature's direction u, f_j (d_j . u), has a decoder row at a cosine
    of at least `cosine` with u, and contributes at least `share` of what the feature's own latent
    does in the median of the rows in which it fires on the feature. Rows that are missed
    for want of room (k too small) have no such contributor, and are not counted. Latents at a
    cosine of `same` with u are copies of the feature's own latent: splitting is not absorption.

    0 where the latent never fires on the feature, or points away from it, since then it is not
    that feature's latent and there is nothing to absorb. A cosine of chance is about 1 / sqrt(d);
    `cosine` should be well above.

    Args:
        codes: Codes of the rows.
        decoder: Decoder rows of the dictionary.
        latent: The latent that stands for the feature.
        direction: The feature's direction, of any length.
        is_on: Rows in which the feature is truly on: known, or told by a probe, or by the
            latent of a narrower dictionary, which absorbs less.
        cosine: See above.
        share: See above.
        same: See above.

    Raises:
        ValueError: The shapes do not belong together, the direction is 0, or an option is out
            of range.
    """
    _check(codes, decoder, cosine, share)
    if not 0 <= latent < len(decoder) or len(is_on) != codes.n_rows or not direction.any():
        raise ValueError(
            f"Absorption needs a latent below {len(decoder)}, a direction other than 0 and a truth "
            f"for each of {codes.n_rows} rows, got latent {latent} and {len(is_on)} rows."
        )
    rows = is_on.cpu().nonzero()[:, 0].numpy()
    length = decoder.detach().cpu().double().norm(dim=1).numpy()
    cosines = (unit_rows(decoder) @ unit_rows(direction[None])[0]).numpy()
    reach = _Reach(length * cosines, cosines >= cosine, cosines >= same)
    return _absorbed(_values(codes)[rows], latent, reach, share)


def absorption_by_narrower(
    codes: Codes,
    decoder: Float[Tensor, "w d"],
    narrow_codes: Codes,
    narrow_decoder: Float[Tensor, "w_narrow d"],
    *,
    matched: float = 0.8,
    cosine: float = 0.25,
    share: float = 0.5,
    same: float = 0.9,
) -> list[Absorption]:
    """`absorption_of_feature` for every latent that a narrower dictionary has too, without labels.

    The narrower dictionary has fewer special latents to absorb its general ones, so that where its
    latent fires the feature is taken to be on. It says nothing of a feature that is absorbed
    in both, and reads a narrower latent that mixes two features as absorption of one by the other.

    Args:
        codes: Codes of the dictionary in question.
        decoder: Its decoder rows.
        narrow_codes: Codes of the narrower dictionary for the same rows.
        narrow_decoder: Its decoder rows.
        matched: Least cosine between latents of the two that are one feature; see `assign`.
        cosine: See `absorption_of_feature`.
        share: See `absorption_of_feature`.
        same: See `absorption_of_feature`.

    Returns:
        One for each matched latent, in the order of the narrower dictionary.

    Raises:
        ValueError: The shapes do not belong together, or an option is out of range.
    """
    _check(codes, decoder, cosine, share)
    if codes.n_rows != narrow_codes.n_rows or narrow_codes.d_sae != len(narrow_decoder):
        raise ValueError(
            f"Codes of {codes.n_rows} and {narrow_codes.n_rows} rows, and {narrow_codes.d_sae} "
            f"latents with {len(narrow_decoder)} decoder rows: encode the same rows with both."
        )
    narrow_latents, latents, _ = assign(narrow_decoder, decoder, at_least=matched)
    values, narrow_on = _values(codes), firing_pattern(narrow_codes).tocsc()
    length = decoder.detach().cpu().double().norm(dim=1).numpy()
    table = (unit_rows(narrow_decoder)[narrow_latents] @ unit_rows(decoder).T).numpy()
    return [
        _absorbed(
            values[narrow_on.indices[narrow_on.indptr[narrow] : narrow_on.indptr[narrow + 1]]],
            latent,
            _Reach(length * cosines, cosines >= cosine, cosines >= same),
            share,
        )
        for narrow, latent, cosines in zip(
            narrow_latents.tolist(), latents.tolist(), table, strict=True
        )
    ]


class _Reach(NamedTuple):
    """How each latent of a dictionary stands to the direction of a feature."""

    along: Float[np.ndarray, " w"]
    """What one unit of its activation adds along the direction."""
    contains: Bool[np.ndarray, " w"]
    """Whether its row contains enough of it to absorb the feature."""
    is_copy: Bool[np.ndarray, " w"]
    """Whether its row is that direction."""


def _check(codes: Codes, decoder: Float[Tensor, "w d"], cosine: float, share: float) -> None:
    check_cosine(cosine, "cosine")
    if share <= 0 or codes.d_sae != len(decoder):
        raise ValueError(
            f"Absorption needs a positive share and codes of as many latents as the decoder has, "
            f"got {share}, {codes.d_sae} and {len(decoder)}."
        )


def _values(codes: Codes) -> csr_array:
    """The activations, `[n, d_sae]`, their zeros left out."""
    parts = (codes.values.detach().cpu().double(), codes.latents.cpu(), codes.offsets.cpu())
    values = csr_array(tuple(part.numpy() for part in parts), shape=(codes.n_rows, codes.d_sae))
    values.eliminate_zeros()
    return values


def _absorbed(on: csr_array, latent: int, reach: _Reach, share: float) -> Absorption:
    """Of the codes of the rows in which the feature is on."""
    is_own = reach.is_copy.copy()
    is_own[latent] = True
    own = on @ np.where(is_own, reach.along, 0.0)
    missed = on @ is_own.astype(np.float64) == 0
    usual = np.median(own[~missed]) if (~missed).any() else 0.0
    rest = on[missed]
    entry_row = np.repeat(np.arange(rest.shape[0]), np.diff(rest.indptr))
    contribution = rest.data * reach.along[rest.indices]
    # Last of each row in this order is its largest.
    order = np.lexsort((contribution, entry_row))
    largest = order[np.diff(entry_row[order], append=rest.shape[0]) > 0]
    counted = reach.contains[rest.indices[largest]]
    counted &= (usual > 0) & (contribution[largest] >= share * usual)
    absorbers, counts = np.unique(rest.indices[largest[counted]], return_counts=True)
    by_count = np.lexsort((absorbers, -counts))
    return Absorption(
        latent=latent,
        n_on=on.shape[0],
        n_missed=int(missed.sum()),
        n_absorbed=int(counted.sum()),
        absorbers={int(absorbers[i]): int(counts[i]) for i in by_count},
    )
