"""`universality`: do two dictionaries, of two models, layers or seeds, find the same features?

Shape letters: n rows, m dictionaries.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from scipy.sparse import csr_array, vstack
from torch import Tensor

from saefeat.activations.sources import TOKEN_IDS
from saefeat.activations.stream import ActivationStream
from saefeat.core.memory import available_host_bytes
from saefeat.core.progress import progress_bar
from saefeat.dictionaries.base import Dictionary
from saefeat.superposition.universality.aligned import CONTEXTS, aligned_batches
from saefeat.superposition.universality.correlation import (
    LEAST,
    Correlations,
    correlate,
)
from saefeat.superposition.universality.geometry import (
    matched_rsa,
    matched_svcca,
    mmcs,
    mmcs_null,
    mmcs_null_like,
)
from saefeat.superposition.universality.latent_rows import centred, rows_of_codes
from saefeat.superposition.universality.result import MaxCosines, Universality
from saefeat.superposition.universality.score import (
    Resampled,
    context_blocks,
    draw_weights,
    resample,
    score,
)

Reader = tuple[Dictionary, ActivationStream]
"""A dictionary, and the stream whose activations it reads."""
KEPT_BYTES = 16
"""Of a latent that is on in a row: its number and strength, once as they came and once joined."""
CENTRED_BYTES = 40
"""And of one of two dictionaries that are being correlated: by row, by latent, and once more."""


@torch.no_grad()
def universality(
    a: Reader,
    b: Reader,
    *,
    again: Reader | None = None,
    random: Reader | None = None,
    n_tokens: int = 100_000,
    least_firing: int = 10,
    least_correlation: float = LEAST,
    n_resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Universality:
    """Correlate the latents of two dictionaries on the same held-out tokens, and score it.

        U = (r_AB - r_null) / (r_AA' - r_null)

    with r the mean correlation of latents that are assigned one to one. There are up to three of
    it. "shifted": r_null is that of A with B some contexts further on in the text. "random model":
    that of A with `random`. "token identity": all three once the mean of each latent for each
    token is taken off, so that latents are not alike for naming the same token; r_null is shifted.
    Of models with different tokenizers it is that for each combination of their tokens.

    Args:
        a: A dictionary and its stream.
        b: The other, of another model, layer or seed. Streams must read the same tokens, or those
            that `load_aligned_tokens` gives for different tokenizers; two hooks or seeds of one
            model should share a stream, which is then read once.
        again: A', as A is in all but the seed of its model (or of its dictionary, if that is what
            B differs in). Without it there is no U.
        random: A dictionary of a model with A's shape whose weights are random.
        n_tokens: Held-out rows to read at most. Of each, 8 bytes are kept for every latent that is
            on; nothing grows with latents times rows, nor with latents times latents.
        least_firing: Rows in which a latent must be on to be counted.
        least_correlation: Pairs with at least this correlation are made.
        n_resamples: Of the contexts, for intervals.
        seed: Of the shift and of the resamples.
        progress: Whether to draw a progress bar on standard error.

    Raises:
        KeyError: A stream lacks the hook of its dictionary.
        ValueError: Streams read other text (see `aligned_batches`), nothing was held out, there
            are fewer than 10 contexts, memory will not do, or an option is out of range.
    """
    if least_firing < 1 or n_tokens < 2:
        raise ValueError(
            f"least_firing must be at least 1 and n_tokens at least 2, got {least_firing} and "
            f"{n_tokens}."
        )
    readers = {"a": a, "b": b, "again": again, "random": random}
    given = {name: reader for name, reader in readers.items() if reader is not None}
    codes, contexts, tokens = _read(given, n_tokens, progress)
    blocks = context_blocks(contexts)
    weights = draw_weights(int(blocks.max()) + 1, n_resamples, seed)
    codes["shifted"] = _shifted(codes["b"], contexts, seed)

    def compare(other: str, by: Int[np.ndarray, " n"] | None) -> tuple[Correlations, Resampled]:
        prepared = (
            centred(codes[name], least_firing=least_firing, tokens=by) for name in ("a", other)
        )
        found = correlate(*prepared, least=least_correlation)
        return found, resample(found, codes["a"], codes[other], blocks, weights, tokens=by)

    found, matched = compare("b", None)
    ceiling = compare("again", None)[1] if again is not None else None
    scores = [score("shifted", matched, compare("shifted", None)[1], ceiling)]
    if random is not None:
        scores.append(score("random model", matched, compare("random", None)[1], ceiling))
    if tokens is not None:
        names = ["b", "shifted", *(["again"] if again is not None else [])]
        scores.append(score("token identity", *(compare(name, tokens)[1] for name in names)))
    pairs = found.pairs
    rows = [one[0].W_dec.detach().cpu() for one in (a, b)]
    matched_rows = rows[0][pairs.rows], rows[1][pairs.columns]
    comparable = len(pairs.rows) >= 3
    return Universality(
        names=(a[0].hook_name, b[0].hook_name),
        n_tokens=len(contexts),
        n_contexts=len(np.unique(contexts)),
        d_sae=(a[0].d_sae, b[0].d_sae),
        n_counted=found.n_counted,
        least_firing=least_firing,
        least_correlation=least_correlation,
        rows=pairs.rows,
        columns=pairs.columns,
        correlations=pairs.weights,
        assignment_loss=pairs.loss,
        share_above_half=found.share_above(),
        mppc=found.mppc,
        scores=tuple(scores),
        cosines=_cosines(rows[0], rows[1], found, seed),
        svcca=matched_svcca(*matched_rows, seed=seed) if comparable else None,
        rsa=matched_rsa(*matched_rows, seed=seed) if comparable else None,
    )


def _read(
    readers: dict[str, Reader], n_tokens: int, progress: bool
) -> tuple[dict[str, csr_array], Int[np.ndarray, " n"], Int[np.ndarray, " n"] | None]:
    """The codes of each dictionary, the context of each row, and its tokens if it has any."""
    for dictionary, stream in readers.values():
        if dictionary.hook_name not in stream.hooks:
            raise KeyError(
                f"The stream has no hook {dictionary.hook_name!r}, which its dictionary reads; it "
                f"has {', '.join(stream.hooks)}."
            )
    streams = [stream for _, stream in readers.values()]
    n_held_out = min(stream.n_held_out_rows for stream in streams)
    codes: dict[str, list[csr_array]] = {name: [] for name in readers}
    contexts: list[Tensor] = []
    token_ids: list[Tensor] = []
    n_read = 0
    bar = progress_bar(total=min(n_tokens, n_held_out), unit="tok", desc="encoding", shown=progress)
    for batches, facts in aligned_batches(streams, n_tokens):
        for (name, (dictionary, _)), batch in zip(readers.items(), batches, strict=True):
            x = batch[dictionary.hook_name].to(dictionary.W_dec.device).float()
            # Kept as a matrix on the host from the start, which takes half of what codes do.
            codes[name].append(rows_of_codes([dictionary.encode(x)]))
        if n_read == 0:
            _check_memory([one[0] for one in codes.values()], min(n_tokens, n_held_out))
        contexts.append(facts[CONTEXTS])
        if TOKEN_IDS in facts:
            token_ids.append(torch.stack([batch[TOKEN_IDS] for batch in batches]))
        n_read += len(facts[CONTEXTS])
        bar.update(n_read - bar.n)
    bar.close()
    if n_read == 0:
        raise ValueError("No held-out row is in all streams: each token is left out by one.")
    matrices = {name: vstack(batches, format="csr") for name, batches in codes.items()}
    tokens = _combinations(torch.cat(token_ids, dim=1).numpy()) if token_ids else None
    return matrices, torch.cat(contexts).numpy(), tokens


def _combinations(token_ids: Int[np.ndarray, "m n"]) -> Int[np.ndarray, " n"]:
    """A number for each combination of the tokens of a row; where all are one, the token itself."""
    combined: Int[np.ndarray, " n"] = token_ids[0].astype(np.int64)
    for other in token_ids[1:]:
        if not np.array_equal(other, token_ids[0]):
            combined = np.unique(combined * (1 + int(other.max())) + other, return_inverse=True)[1]
    return combined


def _check_memory(first: Sequence[csr_array], n_tokens: int) -> None:
    """Refuse what will not fit, told by the codes of the first batch."""
    entries = [codes.nnz / codes.shape[0] * n_tokens for codes in first]
    needed = KEPT_BYTES * sum(entries) + CENTRED_BYTES * 2 * max(entries)
    free = available_host_bytes()
    if needed > free:
        raise ValueError(
            f"The codes of {n_tokens:,} tokens would take {needed / 1e9:.3g} GB of memory and "
            f"{free / 1e9:.3g} GB are free: {sum(entries) / n_tokens:,.0f} latents are on for each "
            "token in all dictionaries together. Lower n_tokens, or compare sparser dictionaries."
        )


def _shifted(codes: csr_array, contexts: Int[np.ndarray, " n"], seed: int) -> csr_array:
    """The codes some rows further on, the last ones at the start; a quarter of the text at least.

    So each row meets one of another context, and what neighbours have in common stays.
    """
    n = codes.shape[0]
    shift = int(np.random.default_rng([seed, n]).integers(n // 4, n - n // 4 + 1))
    return vstack([codes[shift:], codes[:shift]], format="csr")


def _cosines(a: Tensor, b: Tensor, found: Correlations, seed: int) -> MaxCosines | None:
    if a.shape[1] != b.shape[1] or min(found.n_counted) == 0:
        return None
    a, b = a[~found.largest_a.isnan()], b[~found.largest_b.isnan()]
    d = a.shape[1]
    return MaxCosines(
        a_in_b=mmcs(a, b),
        b_in_a=mmcs(b, a),
        null=(mmcs_null(d, len(b)), mmcs_null(d, len(a))),
        null_like=(mmcs_null_like(a, b, seed=seed), mmcs_null_like(b, a, seed=seed)),
    )
