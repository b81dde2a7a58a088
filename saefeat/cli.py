"""Flags in, calls out; no logic."""

import io
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal

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
    print(f"Report:       {out}/report/report.json, features.safetensors, density.png")


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


def plan(job: Flags, out: Path = Path("saefeat-run"), json: bool = False) -> None:
    """Say what a training run costs in memory, disk, FLOPs and time, before anything starts.

    A run that does not fit is refused, with the option that would make it fit.

    Example: saefeat plan --expansion-factors 4 8 --tokens 2000000

    Args:
        job: The run.
        out: The folder that the run would make. Nothing is written there.
        json: Print JSON instead of a table.
    """
    from json import dumps

    from saefeat.core.files import check_unclaimed

    check_unclaimed(out)
    job.config()
    cost = job.plan(job.stream(), out)
    print(dumps(cost.to_dict(), indent=2) if json else cost)


def train(job: Flags, out: Path = Path("saefeat-run"), resume: bool = False) -> None:
    """Train dictionaries of every hook, width and seed in one pass over the text.

    A run that does not fit in memory or on the disk is refused before it starts.

    Example: saefeat train --hooks blocks.15.hook_resid_post --expansion-factors 4 8 --out runs/x

    Args:
        job: The run.
        out: A new folder for the trained dictionaries.
        resume: Go on with the run in that folder.
    """
    from saefeat.core.files import check_unclaimed

    if not resume:
        check_unclaimed(out)
    job.config()
    stream = job.stream()
    if not resume:
        print(job.plan(stream, out).summary, flush=True)
    bank = job.train(stream, out, resume=resume)
    print(f"{bank}: {out}/saes (SAELens opens them too)")


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "plan": plan,
    "cache": cache,
    "train": train,
}


def main(arguments: list[str] | None = None) -> None:
    """The command `saefeat`. Exits with 2 and one line on a bad option or input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    command = _parse([argument for argument in arguments if argument != "--debug"])
    try:
        command()
    except KeyboardInterrupt as stop:
        # 130 is what shells say of a program that SIGINT ended.
        _exit_with(str(stop) or "interrupted", 130)
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        _exit_with(str(error))


def _parse(arguments: list[str]) -> Callable[[], None]:
    """The call that the arguments ask for."""
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            command: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
                {name: _unstarted(command) for name, command in COMMANDS.items()},
                prog="saefeat",
                description="Sparse dictionaries on language models. --debug shows tracebacks.",
                args=arguments,
            )
    except SystemExit as exit_request:
        if exit_request.code:
            _exit_with(_first_statement(complaint.getvalue()))
        raise
    return command


def _unstarted(command: Callable[..., None]) -> Callable[..., Any]:
    """The same signature, but the call is handed back instead of made."""

    @wraps(command)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return partial(command, *args, **kwargs)

    return bound


def _first_statement(box: str) -> str:
    """What a box that tyro draws around a bad option says below its title."""
    parts = [part.strip() for part in re.split("─+|-{5,}", re.sub("[│╭╮╰╯]", " ", box))]
    below_title = [part for part in parts if part][1:]
    return f"{(below_title or [box])[0].rstrip('.')}. See saefeat --help."


def _exit_with(message: str, code: int = 2) -> None:
    # Messages of other libraries may have several lines.
    print("saefeat:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
