"""What a notebook shows of reports, counts and dictionaries, and reports as data frames."""

import sys
from html.parser import HTMLParser

import pytest
import torch
from test_report import feature_count, identity_dictionary

import saefeat as sf

HOSTILE = "<script>alert('a & b')</script>"


class Cells(HTMLParser):
    """The text of each table row and of each line below it; fails on a tag it does not know."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.open = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in ("table", "caption", "tr", "th", "td", "div")
        self.open.append(tag)
        if tag in ("caption", "tr", "div"):
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.rows[-1].append(data)


@pytest.fixture
def report():
    x = torch.rand(80, 4, generator=torch.Generator().manual_seed(0))
    stream = sf.ActivationStream.from_tensors({HOSTILE: x}, batch_size=8, held_out_fraction=0.5)
    bank = sf.Bank({(HOSTILE, 1.0, seed): identity_dictionary(4, seed + 1) for seed in (0, 1)})
    return sf.measure(bank, stream, n_tokens=40, progress=False)


def test_a_report_shows_the_same_cells_as_html_and_as_text(report):
    title, header, *rows = Cells(report._repr_html_()).rows
    text = repr(report).splitlines()
    assert title == [text[0]]
    assert " ".join(header).split() == text[1].split()
    assert [" ".join(row).split() for row in rows[:2]] == [line.split() for line in text[3:5]]
    assert [row[0] for row in rows[:2]] == [HOSTILE, HOSTILE]
    assert [row[0] for row in rows[2:]] == text[5:]


def test_a_count_shows_its_number_and_its_steps():
    truth = sf.SyntheticActivations(n_features=6, d_in=4, density=0.1, seed=0)
    options = {"picks": (1,), "expansion_factors": (2,), "saes": False, "progress": False}
    count = sf.count_features(truth.stream(batch_size=64), n_tokens=2000, seeds=(0, 1), **options)
    first, header, *rows = Cells(count._repr_html_()).rows
    assert first == [str(count).splitlines()[0]]
    assert header[:3] == ["stage", "atoms", "picks"]
    assert [row[0] for row in rows[: len(count.steps)]] == [step.stage for step in count.steps]
    assert repr(count) == str(count)


def test_a_dictionary_shows_its_sizes_origin_and_recipe():
    sae = identity_dictionary(4, 2, hook_name=HOSTILE)
    (title,), *rows = Cells(sae._repr_html_()).rows
    assert title == f"TopK of {HOSTILE}"
    shown = dict(rows)
    assert (shown["d_in"], shown["d_sae"], shown["k"], shown["seed"]) == ("4", "4", "2", "0")
    assert "d_sae=4" in repr(sae)


def test_a_report_is_a_data_frame(report):
    frame = report.to_dataframe()
    assert list(frame["seed"]) == [0, 1]
    assert list(frame["fvu"]) == [row.fvu for row in report.rows]
    assert list(frame["density_quantiles.0.5"]) == [
        row.density_quantiles["0.5"] for row in report.rows
    ]
    assert frame.groupby("hook_name")["n_alive"].max()[HOSTILE] == max(
        row.n_alive for row in report.rows
    )


def test_without_pandas_an_error_says_what_to_install(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        report.to_dataframe()


def test_a_count_beyond_the_limit_shows_a_lower_bound():
    step = sf.superposition.counting.feature_count.Step(
        stage="whole",
        d_sae=8,
        picks=1,
        n_tokens=1000,
        n_features=5,
        n_strict=4,
        n_combined=0,
        shared_energy=0.5,
        coverage=0.4,
        chao2=9.0,
        fvu=0.2,
    )
    count = feature_count(identifiable=False, high=float("inf"), steps=(step,))
    assert "at least 5 features" in Cells(count._repr_html_()).rows[0][0]
