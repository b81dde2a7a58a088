"""Flags in, calls out; no logic."""

import sys
from pathlib import Path

import tyro


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


def main(arguments: list[str] | None = None) -> None:
    """The command `saefeat`. Exits with 2 and one line on a bad option or input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"demo": demo},
            prog="saefeat",
            description="Sparse dictionaries on language models. --debug shows tracebacks.",
            args=[argument for argument in arguments if argument != "--debug"],
        )
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"saefeat: {error}", file=sys.stderr)
        sys.exit(2)
