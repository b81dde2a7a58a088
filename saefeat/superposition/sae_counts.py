"""`sae_counts`: every count of features that a bank of dictionaries with several seeds allows."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefeat.activations.stream import ActivationStream
from saefeat.core.progress import progress_bar
from saefeat.dictionaries.batch_topk import BatchTopKConfig
from saefeat.metrics.contribution import AblationCosts
from saefeat.metrics.sparsity import SparsityCounts
from saefeat.superposition.estimators import SeedCounts, costly_latents
from saefeat.superposition.matching import merge_duplicates, near_duplicates
from saefeat.training.bank import Bank, Key


@dataclass(frozen=True, kw_only=True, slots=True)
class SAECounts:
    """Counts of the features at one hook from the seeds of one width, side by side."""

    hook_name: str
    """Of crosscoders, the name of their set of hooks."""
    expansion_factor: float
    d_in: int
    d_sae: int
    seeds: tuple[int, ...]
    n_tokens: int
    """Held-out rows of activations that all of it was measured on."""
    alive: SeedCounts
    """Of the latents that fired at least once on them."""
    costly: SeedCounts
    """Of the alive latents whose ablation costs at least `cost_share` of the median cost."""
    distinct: SeedCounts
    """Of those that are costly once near-duplicates within a seed are merged, at the sum of their
    costs: the count to trust, since copies come back from another seed as features do."""
    cost_share: float
    cosine: float
    """Least cosine between latents of two seeds that are one feature."""
    densities: tuple[float, ...]
    """How often the latents that `distinct` counts are on, those of all seeds together in
    descending order; the firings of copies are added."""
    effective: tuple[float, ...]
    """The effective number e^H of each seed; see `metrics.effective_features`."""
    l0: tuple[float, ...]
    """Latents on per row, for each seed."""
    fvu: tuple[float, ...]
    """Fraction of variance unexplained by each seed."""
    split_share: tuple[float, ...]
    """Share of each seed's alive latents with another alive one at a cosine of 0.9 or more: what
    of a wider dictionary's count is splitting."""


def count_recipe(k: int, *, freeze_decoder: bool = False) -> BatchTopKConfig:
    """A recipe for SAEs whose latents are to be counted, or for their control, frozen ones.

    Of 128 planted features in 32 dimensions (density .01, 2M rows in batches of 512, 512 latents)
    this one found .92 at a cosine of .9; without the auxiliary loss .72, without annealing k
    .79, at half the rate .65, and at twice the rate .99 with 25 that are no features besides.
    """
    return BatchTopKConfig(
        k=k, k_start_factor=4.0, learning_rate=2e-3, freeze_decoder=freeze_decoder
    )


@torch.no_grad()
def sae_counts(
    bank: Bank,
    stream: ActivationStream,
    *,
    hook_name: str | None = None,
    n_tokens: int = 100_000,
    cosine: float = 0.8,
    cost_share: float = 0.1,
    progress: bool = True,
) -> tuple[SAECounts, ...]:
    """Count features from the seeds of a bank, for each of its hooks and widths.

    The counts of one hook, in the order of width, are its width curve. Where the stable count
    stops growing with the width and little is split, the features that training finds have run
    out; where it grows, there is more to find, or `split_share` grows with it.

    Args:
        bank: Dictionaries, at least two seeds of each hook and width.
        stream: A stream with the hooks of the bank; only its held-out part is read.
        hook_name: The hook to count at, or the name of a crosscoder's set; None counts at all.
        n_tokens: Held-out rows to measure on; fewer if fewer were held out.
        cosine: Least cosine between latents of two seeds that are one feature.
        cost_share: See `costly_latents`.
        progress: Whether to draw a progress bar on standard error.

    Returns:
        Counts by hook in the order of the bank, then by width from the narrowest.

    Raises:
        KeyError: The bank has no such hook, or the stream lacks a hook of the bank.
        ValueError: A hook and width has one seed only, an option is out of range, nothing was held
            out, or the activations do not vary.
    """
    families = _families(bank, hook_name)
    measured = Bank({key: bank[key] for keys in families for key in keys})
    needed = measured.needed(stream.hooks)
    if n_tokens < 2:
        raise ValueError(f"n_tokens must be at least 2, got {n_tokens}.")
    decoders = {key: one.balanced(one.W_dec) for key, one in measured.items()}
    sparsity = {key: SparsityCounts(one.norm(dim=1)) for key, one in decoders.items()}
    costs = {key: AblationCosts(one) for key, one in decoders.items()}
    n_seen = 0
    with progress_bar(
        total=min(n_tokens, stream.n_held_out_rows), unit="tok", desc="counting", shown=progress
    ) as bar:
        for batch in stream.held_out_batches(n_tokens):
            n_seen += len(next(iter(batch.values())))
            bar.update(n_seen - bar.n)
            rows = {name: batch[name].cpu().float() for name in needed}
            for key, dictionary in measured.items():
                x, target = measured.rows_of(key, rows)
                codes = dictionary.encode(x)
                recon = dictionary.decode(codes)
                sparsity[key].update(codes)
                costs[key].update(codes, dictionary.balanced(target), dictionary.balanced(recon))
    return tuple(
        _counts(measured, keys, decoders, sparsity, costs, n_seen, cosine, cost_share)
        for keys in families
    )


def _families(bank: Bank, hook_name: str | None) -> list[list[Key]]:
    """The keys of each hook, or set of hooks, and width, by hook and then by width."""
    names = list(dict.fromkeys(key[0] for key in bank))
    if hook_name is not None and hook_name not in names:
        raise KeyError(f"The bank has no hook {hook_name!r}; it has {', '.join(names)}.")
    wanted = names if hook_name is None else [hook_name]
    families: dict[tuple[str, float], list[Key]] = {
        (name, factor): []
        for name in wanted
        for factor in sorted({key[1] for key in bank if key[0] == name})
    }
    for key in bank:
        if key[0] in wanted:
            families[key[:2]].append(key)
    for (name, factor), keys in families.items():
        if len(keys) < 2:
            raise ValueError(
                f"Counting at {name!r}, expansion factor {factor:g}, needs at least 2 seeds, "
                f"better 3, and the bank has seed {keys[0][2]} only. Train with seeds=[0, 1, 2]."
            )
    return list(families.values())


def _counts(
    bank: Bank,
    family: list[Key],
    decoders_of: dict[Key, Float[Tensor, "d_sae d_out"]],
    sparsity: dict[Key, SparsityCounts],
    costs: dict[Key, AblationCosts],
    n_tokens: int,
    cosine: float,
    cost_share: float,
) -> SAECounts:
    hook_name, expansion_factor, _ = family[0]
    first = bank[family[0]]
    decoders = [decoders_of[key] for key in family]
    alive = [sparsity[key].firing > 0 for key in family]
    shares = [costs[key].share_of_variance.cpu() for key in family]
    costly = [costly_latents(share, cost_share) for share in shares]
    distinct, densities = [], []
    for key, decoder, share, fired in zip(family, decoders, shares, alive, strict=True):
        stands_for = merge_duplicates(decoder * fired[:, None], weights=share)
        distinct.append(costly_latents(_merged(share, stands_for), cost_share))
        density = _merged(sparsity[key].density, stands_for)[distinct[-1]]
        densities += density.clamp(max=1).tolist()
    return SAECounts(
        hook_name=hook_name,
        expansion_factor=expansion_factor,
        d_in=first.d_in,
        d_sae=first.d_sae,
        seeds=tuple(key[2] for key in family),
        n_tokens=n_tokens,
        alive=SeedCounts.of(decoders, alive, cosine=cosine),
        costly=SeedCounts.of(decoders, costly, cosine=cosine),
        distinct=SeedCounts.of(decoders, distinct, cosine=cosine),
        cost_share=cost_share,
        cosine=cosine,
        densities=tuple(sorted(densities, reverse=True)),
        effective=tuple(sparsity[key].effective_features for key in family),
        l0=tuple(sparsity[key].l0 for key in family),
        fvu=tuple(costs[key].fidelity.fvu for key in family),
        split_share=tuple(
            _share(near_duplicates(decoder[fired]))
            for decoder, fired in zip(decoders, alive, strict=True)
        ),
    )


def _merged(
    amounts: Float[Tensor, " d_sae"], stands_for: Int[Tensor, " d_sae"]
) -> Float[Tensor, " d_sae"]:
    """The amounts of the latents that stand for others, those of the others added; 0 elsewhere."""
    known = stands_for >= 0
    return torch.zeros_like(amounts).index_add_(0, stands_for[known], amounts[known])


def _share(counted: Tensor) -> float:
    return float(counted.double().mean()) if len(counted) else 0.0
