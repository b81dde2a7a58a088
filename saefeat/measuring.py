"""What `saefeat measure` does: the report of a run, or of a dictionary, on text or a store."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from saefeat.activations.stream import ActivationStream
from saefeat.core.distributed import current
from saefeat.core.files import check_unclaimed
from saefeat.job import Job
from saefeat.report.measure import measure
from saefeat.report.record import Report
from saefeat.superposition.counting import count_features
from saefeat.training.bank import Bank


def measure_run(
    run: Path,
    *,
    out: Path | None = None,
    store: str | None = None,
    model: str | None = None,
    text: Path | None = None,
    tokens: int = 100_000,
    ce_tokens: int = 4096,
    ablation: str = "zero",
    counts: int | None = None,
    features: int = 200,
    device: str = "auto",
    progress: bool = True,
) -> tuple[Report, Path]:
    """Measure what is in a folder on held-out tokens, and write the report.

    Args:
        run: The folder of a run, or of one dictionary that `load_dictionary` opens.
        out: A new folder for the report; None for `report` in `run`.
        store: What `cache_activations` wrote, to be read in place of a text.
        model: The language model; None for the one that the dictionaries are of, and for none
            with a store.
        text: A text file or folder; None for the held-out part of what `saefeat train` read.
        tokens: Held-out rows to measure on.
        ce_tokens: Tokens for the loss recovered; 0 leaves it out.
        ablation: As for `measure`.
        counts: Rows to count the features of every hook on; None counts nothing.
        features: As for `measure`.
        device: Of the language model and of counting.
        progress: Whether to draw progress bars on standard error.

    Returns:
        The report, and the folder that it is in.

    Raises:
        ValueError: The run does not say what was read and no text or store is given, or both
            are; or as for `measure` and `count_features`.
        OSError: A folder is missing, or `out` holds files.
    """
    bank = Bank.load(run)
    out = run / "report" if out is None else out
    check_unclaimed(out, "report")
    if store is not None and text is not None:
        raise ValueError(f"Measure on --store {store} or on --text {text}, not on both.")
    language_model = None
    if store is None:
        job = _job(run, bank, model, text, device)
        language_model = job.language_model()
        stream = job.stream(language_model)
    else:
        stream = ActivationStream.from_store(store, _hooks(bank))
        if model is not None:
            language_model = Job(model=model, device=device).language_model()
    counted = [
        count_features(
            stream,
            n_tokens=counts,
            hook_name=hook_name,
            saes=False,
            device=device,
            progress=progress,
        )
        for hook_name in _counted(bank)
        if counts is not None
    ]
    report = measure(
        bank,
        stream,
        n_tokens=tokens,
        model=language_model,
        ce_tokens=ce_tokens,
        ablation=ablation,
        counts=counted,
        features=features,
        progress=progress,
    )
    current().on_first(lambda: report.save(out))
    return report, out


def _job(run: Path, bank: Bank, model: str | None, text: Path | None, device: str) -> Job:
    """The text as `saefeat train` read it, so that what it held out is held out again.

    Of another text a tenth is, in contexts of the length that the dictionaries were trained on.
    """
    changes: dict[str, Any] = {"hooks": tuple(_hooks(bank)), "device": device}
    if model is not None:
        changes["model"] = model
    trained = None
    if (run / "config.json").is_file():
        try:
            trained = Job.of_run(run / "config.json")
        except ValueError:
            if text is None:
                raise
    if trained is not None and text is None:
        return replace(trained, **changes)
    origins = [one.origin for one in bank.values()]
    names = {one.model_name for one in origins} if trained is None else {trained.model}
    known = model or next(iter(names))
    if text is None or known is None or (len(names) > 1 and model is None):
        raise ValueError(
            f"{run} does not say which text and model to measure on: give --text and --model, or "
            "--store."
        )
    sizes = [one.context_size for one in origins if one.context_size is not None]
    if sizes:
        changes["context_size"] = min(sizes)
    return Job(**{"model": known, "text": text, **changes})


def _hooks(bank: Bank) -> list[str]:
    """All that is read or predicted, each once."""
    return list(dict.fromkeys([*bank.hooks, *(bank.targets[key] for key in _of_one_hook(bank))]))


def _counted(bank: Bank) -> Sequence[str]:
    """The hooks that the report has a summary of, so that a count has its place there."""
    return list(dict.fromkeys(key[0] for key in _of_one_hook(bank)))


def _of_one_hook(bank: Bank) -> Sequence[tuple[str, float, int]]:
    return [key for key, one in bank.items() if not one.reads_several_hooks]
