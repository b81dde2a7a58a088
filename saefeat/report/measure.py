"""`measure`: what the dictionaries of a bank do on tokens that training never saw."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from saefeat.activations.stream import ActivationStream
from saefeat.core.distributed import current
from saefeat.core.progress import progress_bar
from saefeat.dictionaries.base import Dictionary
from saefeat.dictionaries.crosscoder import AcrossHooks
from saefeat.metrics.fidelity import FidelitySums
from saefeat.metrics.layers import layer_profile
from saefeat.metrics.loss_recovered import CrossEntropy, ce_loss_recovered
from saefeat.metrics.sparsity import SparsityCounts, features_per_neuron
from saefeat.report.collect import MOST_VIEWS, ViewCollector, token_texts
from saefeat.report.layers import layer_summaries
from saefeat.report.record import QUANTILES, LossTokens, Report, Row, label, layer_number
from saefeat.superposition.counting.feature_count import FeatureCount
from saefeat.superposition.joint_features import JointFeatures
from saefeat.training.bank import Bank, Key


@torch.no_grad()
def measure(
    bank: Bank,
    stream: ActivationStream,
    *,
    n_tokens: int = 100_000,
    model: Any = None,
    ce_tokens: int = 4096,
    ablation: str = "zero",
    counts: Sequence[FeatureCount] = (),
    features: int = 200,
    progress: bool = True,
) -> Report:
    """Measure every dictionary on the same held-out tokens.

    A crosscoder is measured on all its hooks together, each scaled to the same mean norm, and its
    FVU at each hook besides. Its neurons are those of all its hooks. No loss recovered is given
    for it: it reads later layers, which know what an earlier one held before it was replaced.

    Of several processes of torch.distributed each measures its share of the rows and contexts, and
    all get the same report, to within rounding that of one process.

    Args:
        bank: The dictionaries.
        stream: The stream that they were trained on, or another with the same hooks; only its
            held-out part is read.
        n_tokens: Rows to measure on; fewer if fewer were held out. A latent is alive if it
            fires on any of them, so compare reports of equal `n_tokens` only.
        model: The language model, for the cross-entropy loss recovered, the tokens that latents
            promote and the text of those that the page shows; None leaves these out.
        ce_tokens: Held-out tokens for the loss, each of which the model reads in full once for
            each dictionary, once for each hook, and once clean; 0 leaves the loss out.
        ablation: What a hook's activations are replaced by for the loss that a dictionary
            recovers from: "zero", or "mean" for their mean over the held-out tokens.
        counts: What `count_features` gave for some of the hooks. The summary of such a layer has
            its count, load and coverage; that of another has what the seeds of the widest
            dictionaries share, or, with one seed only, the alive latents.
        features: Latents of each dictionary that the report's page shows one by one, chosen at
            even ranks of density among those that fired (see `ViewCollector`); at most 6,000 of
            all dictionaries together. 0 shows none, and nor do several processes.
        progress: Whether to draw progress bars on standard error.

    Returns:
        A report with a row for each dictionary, in the order of the bank.

    Raises:
        KeyError: The stream lacks a hook of the bank.
        ValueError: An option is out of range, nothing was held out, or a measure is undefined.
    """
    if n_tokens < 2 or ce_tokens < 0 or features < 0 or ablation not in ("zero", "mean"):
        raise ValueError(
            "n_tokens must be at least 2, ce_tokens and features at least 0 and ablation "
            f"'zero' or 'mean', got {n_tokens}, {ce_tokens}, {features} and {ablation!r}."
        )
    targets = bank.targets
    wanted = bank.needed(stream.hooks)
    measures_loss = model is not None and ce_tokens > 0
    if measures_loss and stream.held_out_tokens is None:
        raise ValueError(
            "The loss recovered needs held-out tokens, and this stream has none (it was made "
            "from tensors, or nothing was held out). Leave model=None, or set ce_tokens=0."
        )
    sparsity = {key: SparsityCounts(one.decoder_norms.detach()) for key, one in bank.items()}
    ranks = current()
    # A process sees the highest activations of its own part alone.
    n_shown = min(features, MOST_VIEWS // len(bank)) if ranks.size == 1 else 0
    collectors = {
        key: ViewCollector(one, n_shown, stream.has_tokens) for key, one in bank.items() if n_shown
    }
    fidelity = {key: FidelitySums() for key in bank}
    joint = {key: JointFeatures(one) for key, one in bank.items() if isinstance(one, AcrossHooks)}
    row_sums = {name: torch.zeros(stream.widths[name], dtype=torch.float64) for name in wanted}
    n_seen = 0
    progress = progress and ranks.is_first
    bar = progress_bar(
        total=min(n_tokens, stream.n_held_out_rows), unit="tok", desc="measuring", shown=progress
    )
    with_tokens = bool(collectors) and stream.has_tokens
    for batch in stream.held_out_batches(n_tokens, with_tokens=with_tokens, ranks=ranks):
        n = len(next(iter(batch.values())))
        n_seen += n
        bar.update(n_seen - bar.n)
        rows = {name: batch[name][ranks.part(n)].cpu().float() for name in wanted}
        if len(next(iter(rows.values()))) == 0:
            continue  # Fewer rows than processes are left.
        for name, total in row_sums.items():
            total += rows[name].double().sum(0)
        for key, dictionary in bank.items():
            x, target = bank.rows_of(key, rows)
            codes = dictionary.encode(x)
            recon = dictionary.decode(codes)
            sparsity[key].update(codes)
            if key in collectors:
                collectors[key].update(codes, batch)
            fidelity[key].update(dictionary.balanced(target), dictionary.balanced(recon))
            if key in joint:
                joint[key].update(codes, x, recon)
    bar.close()
    for key, dictionary in bank.items():
        sparsity[key].add_up(ranks)
        fidelity[key].add_up(ranks, dictionary.d_out)
        if key in joint:
            joint[key].add_up(ranks)
    row_sums = ranks.sum_each(row_sums)
    losses: dict[Key, dict[str, float]] = {}
    cross_entropy = None
    if measures_loss and stream.held_out_tokens is not None:
        n_contexts = max(1, ce_tokens // stream.held_out_tokens.context_size)
        evaluated = stream.held_out_tokens.first(n_contexts)
        evaluation = CrossEntropy(model, evaluated, ranks=ranks)
        means = {name: (total / n_seen).float() for name, total in row_sums.items()}
        losses, cross_entropy = _losses(bank, evaluation, ablation, means, progress)
    measured = []
    for key, dictionary in bank.items():
        row = _row(key, dictionary, targets[key], sparsity[key], fidelity[key], losses.get(key, {}))
        if isinstance(dictionary, AcrossHooks):
            counted = joint[key].counted
            row = replace(
                row,
                layer=None,
                fvu_by_hook=joint[key].fvu_by_hook,
                layer_profile=asdict(layer_profile(dictionary, counted)) if counted.any() else None,
            )
        measured.append(row)
    views = {
        label(*key): one.views(bank[key], sparsity[key], targets[key], model)
        for key, one in collectors.items()
    }
    return Report(
        saefeat_version=metadata.version("saefeat"),
        model=stream.model_name,
        n_tokens=n_seen,
        rows=measured,
        layers=layer_summaries(bank, measured, sparsity, counts),
        left_out=asdict(stream.left_out),
        cross_entropy=cross_entropy,
        densities={label(*key): counts.density.float() for key, counts in sparsity.items()},
        views=views,
        token_texts=token_texts(views, model),
    )


def _losses(
    bank: Bank,
    evaluation: CrossEntropy,
    ablation: str,
    means: Mapping[str, Tensor],
    progress: bool,
) -> tuple[dict[Key, dict[str, float]], LossTokens]:
    clean = evaluation.clean()
    losses: dict[Key, dict[str, float]] = {}
    ablated: dict[str, float] = {}
    measurable = {key: one for key, one in bank.items() if not one.reads_several_hooks}
    bar = progress_bar(
        total=len(measurable), unit="dictionary", desc="loss recovered", shown=progress
    )
    for key, dictionary in measurable.items():
        target = bank.targets[key]
        if target not in ablated:
            mean = means[target] if ablation == "mean" else torch.zeros_like(means[target])
            ablated[target] = evaluation.replaced(target, mean.expand_as)
        spliced = evaluation.replaced(target, dictionary, source=key[0])
        losses[key] = {
            "ce_loss_spliced": spliced,
            "ce_loss_ablated": ablated[target],
            "ce_loss_recovered": ce_loss_recovered(clean, spliced, ablated[target]),
        }
        bar.update()
    bar.close()
    return losses, {
        "clean": clean,
        "ablation": ablation,
        "n_tokens": evaluation.tokens.ids.numel(),
    }


def _row(
    key: Key,
    dictionary: Dictionary,
    target: str,
    sparsity: SparsityCounts,
    fidelity: FidelitySums,
    losses: Mapping[str, float],
) -> Row:
    hook_name, expansion_factor, seed = key
    density = sparsity.density
    alive = density[density > 0]
    return Row(
        hook_name=hook_name,
        target_hook_name=target,
        layer=layer_number(hook_name),
        architecture=dictionary.architecture,
        d_in=dictionary.d_in,
        n_neurons=dictionary.d_in,
        d_sae=dictionary.d_sae,
        expansion_factor=expansion_factor,
        seed=seed,
        l0=sparsity.l0,
        n_alive=sparsity.n_alive,
        dead_fraction=1 - sparsity.n_alive / dictionary.d_sae,
        n_ultralow=sparsity.n_ultralow,
        features_per_neuron=features_per_neuron(sparsity.n_alive, dictionary.d_in),
        effective_features=sparsity.effective_features,
        fvu=fidelity.fvu,
        explained_variance=1 - fidelity.fvu,
        normalized_mse=fidelity.normalized_mse,
        ce_loss_spliced=losses.get("ce_loss_spliced"),
        ce_loss_ablated=losses.get("ce_loss_ablated"),
        ce_loss_recovered=losses.get("ce_loss_recovered"),
        density_quantiles={
            str(q): float(alive.log10().quantile(q)) for q in QUANTILES if len(alive)
        },
    )
