"""Verdicts on simulated models, counted by the real instrument; see the benchmark of that name."""

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def simulation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import study_simulation

    yield study_simulation
    for name in ("study_simulation", "machine"):
        sys.modules.pop(name)


@pytest.mark.parametrize(
    ("theory", "degree_ratio", "total_ratio"),
    [("partitioned", 2, 1), ("filled", 1, 1 / 2), ("shared", 1 / 2, 1 / 4)],
)
def test_simulated_models_obey_their_theory(simulation, theory, degree_ratio, total_ratio) -> None:
    generator = np.random.default_rng(0)
    narrow, wide = (simulation.TRUTHS[theory](shape, 1.0, generator) for shape in simulation.SHAPES)
    assert (len(narrow), len(wide)) == (4, 1)
    assert (wide.mean() / 32) / (narrow.mean() / 16) == pytest.approx(degree_ratio)
    assert wide.sum() / narrow.sum() == pytest.approx(total_ratio)


@pytest.mark.slow
@pytest.mark.parametrize("theory", ["partitioned", "filled", "shared"])
def test_one_study_of_each_theory_is_judged_rightly(simulation, theory) -> None:
    row = simulation.row_of(theory, run=0, n_tokens=simulation.Options().n_tokens)
    assert (row["found"], row["status"]) == (theory, "claimed")
    assert row["right"]
    assert not row["wrong"]
    assert row["counted_b"] == pytest.approx(row["features_b"], rel=0.05)


def test_a_run_that_the_file_has_is_not_repeated(simulation, tmp_path, capsys) -> None:
    out = tmp_path / "simulation.csv"
    columns = "theory,run,right,wrong"
    out.write_text(f"{columns}\nfilled,0,True,False\nfilled,1,False,False\n")
    before = out.read_text()
    simulation.main(simulation.Options(out=out, runs=2, theories=("filled",)))
    assert out.read_text() == before
    assert capsys.readouterr().out == "filled: 1 of 2 right, 0 wrong\n"
