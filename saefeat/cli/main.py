"""From arguments to a call, and from what goes wrong to one line."""

import argparse
import inspect
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial, wraps
from pathlib import Path
from typing import Any

import tyro

from saefeat.cli.commands import COMMANDS
from saefeat.job import Job

SHARED_COMMANDS = ("train", "measure")
"""Commands that several processes run together."""


def main(arguments: list[str] | None = None) -> None:
    """The command `saefeat`. Exits with 2 and one line on a bad option or input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        command = _parse(arguments)
        with _in_step(arguments[0]):
            command()
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        # 130 is what shells say of a program that SIGINT ended.
        _exit_with(str(stop) or "interrupted", 130)
    except (ValueError, KeyError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            # What Python still holds goes nowhere, or it would fail once more on exit; 141 is what
            # shells say of SIGPIPE.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        if debug:
            raise
        # str of a KeyError puts its message in quotation marks.
        _exit_with(str(error.args[0] if isinstance(error, KeyError) else error))


def _reader_has_left() -> bool:
    """Whether it is standard output that broke, as when `head` has had enough; pipes are many."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(state & select.POLLERR for _, state in output.poll(0))


@contextmanager
def _in_step(name: str) -> Iterator[None]:
    """With the processes that torchrun started, if it did; the first of them prints."""
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if n_processes == 1:
        yield
        return
    if name not in SHARED_COMMANDS:
        raise ValueError(
            f"saefeat {name} runs in one process, and torchrun started {n_processes}. Run it "
            f"without torchrun; {' and '.join(SHARED_COMMANDS)} share their work."
        )
    from saefeat.core.distributed import process_group

    with process_group() as ranks, redirect_stdout(sys.stdout if ranks.is_first else io.StringIO()):
        yield


def _parse(arguments: list[str]) -> Callable[[], None]:
    """The call that the arguments ask for."""
    complaint = io.StringIO()
    described = _described_by(arguments)
    job = None if described is None else Job.of_run(described)
    try:
        with redirect_stderr(complaint):
            command: Callable[[], None] = tyro.extras.subcommand_cli_from_dict(
                {name: _unstarted(command, job) for name, command in COMMANDS.items()},
                prog="saefeat",
                description=(
                    "Sparse dictionaries on language models. --debug shows tracebacks; "
                    "--tyro-write-completion bash FILE writes completions (or zsh, fish)."
                ),
                args=arguments,
            )
    except SystemExit as exit_request:
        if exit_request.code:
            _exit_with(_first_statement(complaint.getvalue()))
        raise
    return command


def _described_by(arguments: list[str]) -> Path | None:
    """The config.json whose options are the defaults of the flags; None if they have their own."""
    if arguments[:1] not in (["plan"], ["train"]):
        return None
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("--config", type=Path)
    known.add_argument("--out", type=Path, default=Path("saefeat-run"))
    known.add_argument("--resume", action="store_true")
    try:
        flags, _ = known.parse_known_args(arguments[1:])
    except argparse.ArgumentError:
        return None  # tyro says what is wrong with it.
    own: Path = flags.out / "config.json"
    described: Path | None = flags.config
    return own if described is None and flags.resume and own.is_file() else described


def _unstarted(command: Callable[..., None], job: Job | None) -> Callable[..., Any]:
    """The same signature, but the call is handed back instead of made.

    `job` is where the flags of a run begin; None for the defaults of `Job`.
    """

    @wraps(command)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return partial(command, *args, **kwargs)

    if job is not None:
        signature = inspect.signature(command)
        parameters = [
            one.replace(default=job) if name == "job" else one
            for name, one in signature.parameters.items()
        ]
        vars(bound)["__signature__"] = signature.replace(parameters=parameters)
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
