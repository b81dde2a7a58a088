"""Every block of code in README runs: Python in order, commands in a shell.

A section begins with the names that "In a script" has left, in a folder of its own, where
corpus.txt lies; its blocks build on each other. To end soon, numbers are smaller here (`MOST`,
`OPTIONS`), and of all layers one or two are read. Nothing else is replaced:
the model is the real one, and the hub answers on this machine.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saefeat.dictionaries import registry

README = Path(__file__).parent.parent / "README.md"
SCRIPT = "In a script"
MOST = {"n_tokens": 5_000, "checkpoint_every": 1}
OPTIONS = {"tokens": 2_000, "nproc-per-node": 2}
ALL_LAYERS = "blocks.*.hook_resid_post"
ONE_LAYER = "blocks.3.hook_resid_post"
TWO_LAYERS = "blocks.[36].hook_resid_post"  # of commands, in which two processes divide the bank
INSTALLS = "python3 -m venv"
CORPUS = Path(argparse.__file__).read_text()[:60_000]
SLOW = ("How many features?",)


def blocks_of(text: str) -> list[tuple[str, str, str]]:
    """`(section, language, code)` of every block; code starts at its line of the file."""
    found, section, language, code = [], "", None, []
    for number, line in enumerate(text.splitlines()):
        if line.startswith("```"):
            if language is None:
                language, code = line[3:], ["\n" * number]
            else:
                found.append((section, language, "\n".join(code)))
                language = None
        elif language is not None:
            code.append(line)
        elif line.startswith("## "):
            section = line[3:]
    return found


BLOCKS = blocks_of(README.read_text())
SECTIONS = list(dict.fromkeys(section for section, language, _ in BLOCKS if language == "python"))
COMMANDS = [code for _, language, code in BLOCKS if language == "sh" and INSTALLS not in code]


class Smaller(ast.NodeTransformer):
    """Lowers numbers to `MOST`, and reads fewer hooks."""

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        if node.arg in MOST and isinstance(node.value, ast.Constant):
            node.value.value = min(node.value.value, MOST[node.arg])
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value == ALL_LAYERS:
            node.value = ONE_LAYER
        return node


def run_section(section: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs the Python of a section where it stands, and gives the names that it leaves."""
    for title, language, code in BLOCKS:
        if title == section and language == "python":
            tree = Smaller().visit(ast.parse(code, filename=str(README)))
            exec(compile(tree, str(README), "exec"), names)
    return names


@pytest.fixture(scope="module")
def script(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that "In a script" leaves."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "corpus.txt").write_text(CORPUS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_section(SCRIPT, {"__name__": "readme"})


def test_every_block_is_python_a_command_or_what_they_print() -> None:
    assert {language for _, language, _ in BLOCKS} == {"python", "sh", ""}
    assert SCRIPT in SECTIONS
    assert len(COMMANDS) == sum(language == "sh" for _, language, _ in BLOCKS) - 2


def test_the_first_script_trains_measures_and_encodes(script: dict[str, Any]) -> None:
    assert [row.expansion_factor for row in script["report"].rows] == [4, 4, 8, 8]
    assert script["codes"].to_dense().shape == (len(script["x"]), 8 * 576)


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name in SECTIONS
        if name != SCRIPT
    ],
)
def test_section_runs(
    section: str,
    script: dict[str, Any],
    hub: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "corpus.txt").write_text(CORPUS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "KINDS", registry.KINDS)  # a section adds to it
    run_section(section, dict(script))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command: str, smollm2: Any, tmp_path: Path) -> None:
    for option, most in OPTIONS.items():
        command = re.sub(rf"--{option} \d+", f"--{option} {most}", command)
    command = command.replace(ALL_LAYERS, TWO_LAYERS)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        check=True,
    )
