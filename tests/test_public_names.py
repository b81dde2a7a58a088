"""The names that `import saefeat` promises, and what importing it costs."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import saefeat

HEAVY = ("torch", "transformer_lens", "sae_lens", "scipy", "matplotlib", "tyro", "datasets")
HEAVY += ("transformers", "numpy", "safetensors")


@pytest.mark.parametrize("name", saefeat.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(saefeat, name)
    assert inspect.getdoc(value)
    assert value is getattr(saefeat, name)
    if name in saefeat._HOMES:
        assert value is getattr(importlib.import_module(saefeat._HOMES[name]), name)


def public_callables() -> Iterator[tuple[str, Any, str | None]]:
    """Every function, class, method and property that a user may call: its name, it, its text."""
    names = [(name, getattr(saefeat, name)) for name in saefeat._HOMES]
    for room in saefeat._ROOMS:
        module = getattr(saefeat, room)
        names += [(f"{room}.{name}", getattr(module, name)) for name in module.__all__]
    for name, value in names:
        yield name, value, inspect.getdoc(value)
        if inspect.isclass(value):
            for member in dir(value):
                # A method that only does what its base promises has the text of its base.
                text = inspect.getdoc(getattr(value, member))
                found = inspect.getattr_static(value, member)
                found = found.__func__ if isinstance(found, classmethod | staticmethod) else found
                found = found.fget if isinstance(found, property) else found
                is_own = str(getattr(found, "__module__", "")).startswith("saefeat")
                if is_own and inspect.isfunction(found) and not member.startswith("_"):
                    yield f"{name}.{member}", found, text


def test_all_that_can_be_called_is_documented_and_annotated() -> None:
    gaps = []
    n_checked = 0
    for name, value, text in public_callables():
        n_checked += 1
        if not text:
            gaps.append(f"{name} has no docstring")
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            missing = [
                one.name
                for one in signature.parameters.values()
                if one.annotation is one.empty and one.name not in ("self", "cls")
            ]
            if missing or signature.return_annotation is signature.empty:
                gaps.append(f"{name} lacks annotations: {missing or 'return'}")
    assert not gaps
    assert n_checked > 150


def test_names_are_listed_once_and_match_what_type_checkers_see() -> None:
    assert len(set(saefeat.__all__)) == len(saefeat.__all__)
    assert dir(saefeat) == sorted([*saefeat.__all__, "__version__"])
    tree = ast.parse(Path(saefeat.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in guarded.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == set(saefeat.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'saefeat' has no attribute 'no_such_name'"):
        _ = saefeat.no_such_name
    assert not hasattr(saefeat, "tra1n")


def loaded_after(statement: str) -> set[str]:
    """Top-level packages that a new interpreter has loaded after a statement."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(saefeat.__file__).parent.parent,
    )
    return {name.partition(".")[0] for name in json.loads(finished.stdout)}


def test_importing_saefeat_loads_nothing_heavy() -> None:
    loaded = loaded_after("import saefeat; dir(saefeat); saefeat.__version__")
    assert "saefeat" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_training_from_tensors_needs_no_language_model_library_and_no_plots() -> None:
    loaded = loaded_after("from saefeat import ActivationStream, TopKConfig, measure, train")
    assert "torch" in loaded
    lazy = {"transformer_lens", "sae_lens", "matplotlib", "tyro", "datasets", "transformers"}
    assert loaded.isdisjoint(lazy)


def test_the_version_is_that_of_the_package() -> None:
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'\nversion = "{saefeat.__version__}"\n' in pyproject
