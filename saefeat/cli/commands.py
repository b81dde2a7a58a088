"""The commands: flags in, calls out; no logic."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from saefeat.job import Job

Flags = Annotated[Job, tyro.conf.arg(name="")]
"""A job whose fields are flags of the command itself."""


def demo(
    model: str = "smollm2-135m",
    text: Path | None = None,
    layers: tuple[int, ...] = (6,),
    tokens: int = 200_000,
    out: Path = Path("saefeat-demo"),
) -> None:
    """Train one dictionary a layer on a real model in one pass, and report what they hold.

    Example: saefeat demo --layers 0 15 29 --tokens 100000 --out /tmp/first-run

    Args:
        model: "smollm2-135m", a Hugging Face name, or the folder of a model.
        text: A text file or folder. Default: the sources of Python's standard library.
        layers: How many layers, evenly spaced; or, if several numbers, which ones.
        tokens: Activations to train on, a row for each token.
        out: A new folder for the trained dictionaries and the report.
    """
    from saefeat.demo import conclusions, run_demo

    report = run_demo(
        model=model,
        text=text,
        layers=layers[0] if len(layers) == 1 else layers,
        tokens=tokens,
        out=out,
    )
    print(report)
    print(f"\n{conclusions(report, tokens)}\n")
    print(f"Dictionaries: {out}/run/saes (SAELens opens them too)")
    print(f"Report:       {out}/report/report.json, report.html, density.png")


def cache(
    text: Path,
    model: str = "smollm2-135m",
    hooks: tuple[str, ...] = ("blocks.*.hook_resid_post",),
    tokens: int | None = None,
    context_size: int = 128,
    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None,
    seed: int = 0,
    out: str = "acts",
    resume: bool = False,
    append: bool = False,
) -> None:
    """Write the activations of a model on a text to disk, to train on as often as you like.

    Example: saefeat cache --text corpus.txt --hooks "blocks.*.hook_resid_post" --out acts

    Args:
        text: A text file or folder.
        model: "smollm2-135m", a Hugging Face name, or the folder of a model.
        hooks: Hook points, or patterns of them.
        tokens: Activations to store, a row for each token. Default: all that the text gives.
        context_size: Tokens in a context.
        dtype: How to store them; int8 has a scale for each row. Default: as the model computes.
        seed: Decides the order of documents and rows.
        out: A new folder, or a URL such as s3://bucket/acts.
        resume: Go on with a call that was interrupted.
        append: Add to a store of the same model and hooks.
    """
    from saefeat.caching import cache_text

    print(
        cache_text(
            model=model,
            text=text,
            hooks=hooks,
            out=out,
            tokens=tokens,
            context_size=context_size,
            dtype=dtype,
            seed=seed,
            resume=resume,
            append=append,
        )
    )


def plan(
    job: Flags,
    config: Path | None = None,
    out: Path = Path("saefeat-run"),
    json: bool = False,
) -> None:
    """Say what a training run costs in memory, disk, FLOPs and time, before anything starts.

    A run that does not fit is refused, with the option that would make it fit.

    Example: saefeat plan --expansion-factors 4 8 --tokens 2000000

    Args:
        job: The run.
        config: The config.json of an earlier run, whose options hold where no flag says otherwise.
        out: The folder that the run would make. Nothing is written there.
        json: Print JSON instead of a table.
    """
    from json import dumps

    from saefeat.core.files import check_unclaimed

    check_unclaimed(out)
    job.config()
    cost = job.plan(job.stream(), out)
    print(dumps(cost.to_dict(), indent=2) if json else cost)


def train(
    job: Flags,
    config: Path | None = None,
    out: Path = Path("saefeat-run"),
    resume: bool = False,
    json: bool = False,
) -> None:
    """Train dictionaries of every hook, width and seed in one pass over the text.

    A run that does not fit in memory or on the disk is refused before it starts. Several processes
    share the work: torchrun --nproc-per-node 8 -m saefeat train --parallel bank

    Example: saefeat train --hooks blocks.15.hook_resid_post --expansion-factors 4 8 --out runs/x

    Args:
        job: The run.
        config: The config.json of an earlier run, whose options hold where no flag says otherwise.
        out: A new folder for the trained dictionaries.
        resume: Go on with the run in that folder, by its own config.json; begin it if it is new.
        json: Print JSON: the plan, and the folder of each dictionary.
    """
    from json import dumps

    from saefeat.core.distributed import current
    from saefeat.core.files import check_unclaimed
    from saefeat.training.bank import dictionary_folder

    ranks = current()
    if not resume:
        ranks.on_first(lambda: check_unclaimed(out))
    job.config()
    stream = job.stream()
    # A plan is that of one process.
    cost = None if resume or ranks.size > 1 else job.plan(stream, out)
    if cost is not None and not json:
        print(cost.summary, flush=True)
    bank = job.train(stream, out, resume=resume)
    folders = [str(dictionary_folder(out / "saes", key)) for key in bank]
    facts = {"plan": cost and cost.to_dict(), "dictionaries": folders}
    print(dumps(facts, indent=2) if json else f"{bank}: {out}/saes (SAELens opens them too)")


def measure(
    run: tyro.conf.Positional[Path],
    store: str | None = None,
    model: str | None = None,
    text: Path | None = None,
    tokens: int = 100_000,
    ce_tokens: int = 4096,
    ablation: Literal["zero", "mean"] = "zero",
    counts: int | None = None,
    features: int = 200,
    device: str = "auto",
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure dictionaries on held-out tokens: L0, density, FVU, loss recovered, features.

    Example: saefeat measure runs/x --tokens 50000 --counts 300000

    Args:
        run: The folder of a run, or of one dictionary (SAELens, Gemma Scope, sparsify, …).
        store: What `saefeat cache` wrote, to read instead of a text. No loss is measured then
            unless a --model is given.
        model: Default: the model that the dictionaries are of.
        text: A text file or folder. Default: what `saefeat train` held out of its text.
        tokens: Held-out activations to measure on.
        ce_tokens: Tokens for the loss recovered, each read once a dictionary; 0 leaves it out.
        ablation: What the loss is recovered from.
        counts: Activations to count the features of each hook on. They are read ten to twenty
            times, each time by the model unless there is a --store. Default: no count.
        features: Latents of each dictionary that report.html shows one by one.
        device: "auto" is CUDA where there is one, else "cpu".
        out: A new folder for the report. Default: "report" in the run's folder.
        json: Print report.json instead of a table.
    """
    from json import dumps

    from saefeat.measuring import measure_run

    report, folder = measure_run(
        run,
        store=store,
        model=model,
        text=text,
        tokens=tokens,
        ce_tokens=ce_tokens,
        ablation=ablation,
        counts=counts,
        features=features,
        device=device,
        out=out,
    )
    print(dumps(report.to_dict(), indent=2) if json else f"{report}\n\nReport: {folder}")


def report(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    out: Path | None = None,
    page: bool = False,
    json: bool = False,
) -> None:
    """Print a report, or several side by side.

    Example: saefeat report runs/a runs/b

    Args:
        folders: Folders of reports, or of runs that have one.
        out: A new folder to write the report to, as this version writes it. Of one report only.
        page: Make report.html of one report again, as this version draws it.
        json: Print JSON instead of a table.
    """
    from json import dumps

    from saefeat.report.compare import read_reports

    shown = read_reports(folders, out, page)
    print(dumps(shown.to_dict(), indent=2) if json else shown)


def export(
    source: tyro.conf.Positional[Path],
    hooks: tuple[str, ...] = ("*",),
    out: Path = Path("saes"),
    json: bool = False,
) -> None:
    """Write dictionaries as folders that SAELens opens, those of a crosscoder hook by hook.

    Example: saefeat export runs/x --hooks "blocks.1*" --out saes

    Args:
        source: The folder of a run, or of one dictionary (Gemma Scope, sparsify, …).
        hooks: Hook points, or patterns of them.
        out: A new folder.
        json: Print the folders as JSON.
    """
    from json import dumps

    from saefeat.exporting import export as write

    folders = [str(folder) for folder in write(source, out, hooks=hooks)]
    print(dumps(folders, indent=2) if json else "\n".join(folders))


def study(
    quick: bool = False,
    full: bool = False,
    models: tuple[str, ...] = (),
    random_models: tuple[str, ...] = (),
    text: Path | None = None,
    processes: int | None = None,
    out: Path = Path("saefeat-study"),
    json: bool = False,
) -> None:
    """Ask whether features per neuron follow the shape of models of equal size.

    Trains small models of two shapes unless models are given, counts their features layer by layer,
    and says what follows by rules that are written down first. The same command goes on after a
    kill. By default under 75 minutes on two cores.

    Example: saefeat study --quick --out /tmp/first-study

    Args:
        quick: Minutes: proves that everything runs, and is too small to find anything.
        full: Four shapes, five models of each, every layer: days on two cores.
        models: Models of your own instead: folders or Hugging Face names, two shapes, two of each.
        random_models: The same shapes with random weights, as a control.
        text: A text file or folder. Default: the sources of Python's standard library.
        processes: Models at a time, a thread each. Default: one a core.
        out: A new folder for records, findings and pictures.
        json: Print findings.json instead of text.
    """
    from json import dumps

    from saefeat.study.protocol import PRESETS
    from saefeat.study.run import run_study

    if quick and full:
        raise ValueError("--quick and --full are two sizes of study: give one of them.")
    preset = "quick" if quick else "full" if full else "default"
    found = run_study(
        out,
        PRESETS[preset](),
        models=models,
        random_models=random_models,
        text=text,
        processes=processes,
    )
    print(dumps(found.to_dict(), indent=2) if json else f"{found}\n\nStudy: {out}")


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "plan": plan,
    "cache": cache,
    "train": train,
    "measure": measure,
    "report": report,
    "export": export,
    "study": study,
}
