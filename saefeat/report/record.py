"""What a measurement found: one row a dictionary, one summary a layer, and their files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from saefeat.activations.sources import LeftOut
from saefeat.core.files import (
    claim_folder,
    read_json,
    read_tensors,
    write_bytes,
    write_json,
    write_tensors,
)
from saefeat.core.html import table
from saefeat.core.records import fitted, from_json, mapping
from saefeat.metrics.layers import LayerProfile
from saefeat.report.feature_views import FeatureViews, read_views, write_views

if TYPE_CHECKING:
    from pandas import DataFrame

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles of log10 density that a row reports, over the latents that fired."""
COLUMNS = {
    "hook": 28,
    "latents": 8,
    "seed": 4,
    "alive": 7,
    "per neuron": 10,
    "eff.": 7,
    "L0": 6,
    "FVU": 6,
    "CE rec.": 7,
    "log10 density (5/50/95 %)": 26,
}
"""Columns of a table of rows, and the characters that each takes."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One dictionary."""

    hook_name: str
    """Of a crosscoder, the name of its set of hooks; `fvu_by_hook` has their own."""
    target_hook_name: str
    """The hook that it reconstructs: `hook_name`, but for transcoders."""
    layer: int | None
    """The first number in the hook's name; None for a crosscoder."""
    architecture: str
    d_in: int
    n_neurons: int
    """Coordinates of the activations, which a feature can be a direction among."""
    d_sae: int
    expansion_factor: float
    seed: int
    l0: float
    """Mean number of latents on for a token."""
    n_alive: int
    """Latents that fired on at least one of the report's `n_tokens`."""
    dead_fraction: float
    """Share of latents that did not."""
    n_ultralow: int
    """Latents that fired, but in less than 1e-5 of the tokens."""
    features_per_neuron: float
    """`n_alive / n_neurons`: grows with the width, so compare equal widths only."""
    effective_features: float
    """Exponential of the entropy of contributions; see `metrics.effective_features`."""
    fvu: float
    explained_variance: float
    normalized_mse: float
    ce_loss_spliced: float | None
    """Loss of the model with this dictionary in the hook's place, in nats per token."""
    ce_loss_ablated: float | None
    """Loss with the hook ablated."""
    ce_loss_recovered: float | None
    """None where no loss was measured."""
    density_quantiles: dict[str, float]
    """Quantiles of log10 density over the latents that fired."""
    fvu_by_hook: dict[str, float] | None = None
    """FVU at each hook that a crosscoder reads; None for a dictionary of one hook."""
    layer_profile: dict[str, Any] | None = None
    """How a crosscoder's features lie over its hooks; see `metrics.layers`, and for which latents
    are features `superposition.joint_features`."""

    @property
    def label(self) -> str:
        """What tells it from the other dictionaries of a report."""
        return label(self.hook_name, self.expansion_factor, self.seed)

    @property
    def cells(self) -> list[str]:
        """What a table says of it, in the order of `COLUMNS`."""
        recovered = self.ce_loss_recovered
        spread = [self.density_quantiles.get(str(q)) for q in (0.05, 0.5, 0.95)]
        return [
            self.hook_name,
            f"{self.d_sae:,}",
            f"{self.seed}",
            f"{self.n_alive:,}",
            f"{self.features_per_neuron:.2f}",
            f"{self.effective_features:,.0f}",
            f"{self.l0:.1f}",
            f"{self.fvu:.3f}",
            "–" if recovered is None else f"{recovered:.3f}",
            " / ".join("–" if value is None else f"{value:.1f}" for value in spread),
        ]


class Estimate(TypedDict):
    """A number of features."""

    estimate: float
    low: float
    high: float | None
    """None where there is no upper limit."""
    method: str
    """By which it was found."""


class LossTokens(TypedDict):
    """What losses were measured on."""

    clean: float
    """Loss of the model as it is, in nats per token."""
    ablation: str
    """What losses are recovered from."""
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One hook, over the widths and seeds of its dictionaries."""

    hook_name: str
    n_neurons: int
    n_features: Estimate
    """And within which limits."""
    features_per_neuron: float
    coverage: float | None
    """Share of the features that were found; None where the method cannot tell."""
    load: float
    """Sum over latents of p ln(1/p), per neuron, p being the density."""
    identifiable: bool | None
    """Whether the features can be told apart at this load; None where the method cannot tell."""
    width_curve: list[dict[str, int]] = field(default_factory=list)
    """`n_features` that a count found with dictionaries of `d_sae` atoms; empty where there is no
    count."""

    def __str__(self) -> str:
        low, high = self.n_features["low"], self.n_features["high"]
        number = (
            f"at least {low:,.0f} features"
            if high is None
            else f"{self.n_features['estimate']:,.0f} features ({low:,.0f} to {high:,.0f})"
        )
        return (
            f"{self.hook_name}: {number}, {self.features_per_neuron:.2f} per neuron, 2 x load "
            f"{2 * self.load:.2f}; by {self.n_features['method']}"
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """Measurements of a bank on held-out tokens. `print` it, or `save` it."""

    saefeat_version: str
    model: str | None
    n_tokens: int
    """Held-out rows that everything but the loss was measured on."""
    rows: list[Row]
    layers: list[Layer]
    left_out: dict[str, Any] = field(default_factory=dict)
    """Positions that were read and gave no row, by reason."""
    cross_entropy: LossTokens | None = None
    """None where no loss was measured."""
    densities: dict[str, Tensor] = field(default_factory=dict)
    """Density of every latent [d_sae], by `Row.label`."""
    views: dict[str, FeatureViews] = field(default_factory=dict)
    """What the page shows of single latents, by the same names."""
    token_texts: dict[int, str] = field(default_factory=dict)
    """Text of the tokens that it shows; empty where no model was given."""

    def __str__(self) -> str:
        header = table_line(list(COLUMNS), COLUMNS)
        lines = [self._title, header, "-" * len(header)]
        lines += [table_line(row.cells, COLUMNS) for row in self.rows]
        return "\n".join([*lines, *self._notes])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return table(self._title, list(COLUMNS), [row.cells for row in self.rows], self._notes)

    def to_dataframe(self) -> "DataFrame":
        """A pandas DataFrame with a line for each dictionary.

        Columns are those of `Row`; what a row has by name is a column each, such as
        "density_quantiles.0.5".

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            from pandas import json_normalize
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "A data frame needs the package pandas, which is not installed. Run: pip install "
                "pandas"
            ) from error
        return json_normalize([asdict(row) for row in self.rows])

    @property
    def _title(self) -> str:
        return f"{self.model or 'activations'}: {self.n_tokens:,} held-out tokens"

    @property
    def _notes(self) -> list[str]:
        """What there is to say below the table."""
        lines = []
        for row in self.rows:
            if row.layer_profile is not None:
                lines.append(
                    f"{row.hook_name}, {row.d_sae:,} latents, seed {row.seed}: a feature (of "
                    f"{row.layer_profile['n_features']:,}) is held by "
                    f"{row.layer_profile['reuse']:.2f} of {len(row.fvu_by_hook or ())} hooks, and "
                    f"spread over {row.layer_profile['effective_layers']:.2f}."
                )
        lines += [str(layer) for layer in self.layers if layer.coverage is not None]
        lines.append(
            "alive: fired at least once on these tokens; per neuron: alive / neurons of the layer; "
            "eff.: effective features."
        )
        if self.cross_entropy:
            lines.append(
                "CE rec.: loss recovered from {ablation} ablation, clean loss {clean:.3f} nats, "
                "on {n_tokens:,} held-out tokens.".format(**self.cross_entropy)
            )
        if self.left_out.get("outlier_rows"):
            lines.append(
                f"{self.left_out['outlier_rows']} of {self.left_out['positions_read']:,} positions "
                "were left out as attention sinks (norm far above the median)."
            )
        return lines

    def save(self, folder: str | Path) -> Path:
        """Write the report into a new folder.

        Files are `report.json`, `features.safetensors` (densities), `density.png`, the page
        `report.html`, and, where single latents are shown, `feature_views.safetensors` and
        `tokens.json`.

        Raises:
            FileExistsError: The folder already holds files.
        """
        from saefeat.report.plots import density_histograms, png_bytes

        folder = claim_folder(folder, what="report")
        write_tensors(folder / "features.safetensors", self.densities)
        if self.views:
            write_views(folder, self.views, self.token_texts)
        write_bytes(folder / "density.png", png_bytes(density_histograms(self)))
        # After these, so that a folder with a report.json is one that loads.
        write_json(folder / "report.json", self.to_dict())
        self.save_page(folder)
        return folder

    def save_page(self, folder: str | Path) -> Path:
        """Write `report.html`, one file with all of the report, over an older one."""
        from saefeat.report.page.render import render

        path = Path(folder) / "report.html"
        write_bytes(path, render(self).encode())
        return path

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors and token texts, ready for JSON: what is in `report.json`."""
        tensors = ("densities", "views", "token_texts")
        facts = {name: value for name, value in vars(self).items() if name not in tensors}
        facts["layers"] = [asdict(layer) for layer in self.layers]
        facts["rows"] = [asdict(row) for row in self.rows]
        facts["n_shown"] = {name: len(views.latents) for name, views in self.views.items()}
        return facts

    @classmethod
    def load(cls, folder: str | Path) -> "Report":
        """Read a report that `save` wrote; of a run's folder, the one in `report/`.

        Raises:
            FileNotFoundError: The folder holds no report.
            ValueError: A file is damaged, or of another version.
        """
        folder = report_folder(folder)
        path = folder / "report.json"
        facts = mapping(read_json(path), path)
        n_shown = fitted(facts.pop("n_shown", {}), dict[str, int], "n_shown", path)
        report = from_json(cls, facts, path)
        from_json(LeftOut, report.left_out, f"left_out in {path}")
        for row in report.rows:
            if row.layer_profile is not None:
                from_json(LayerProfile, row.layer_profile, f"layer_profile in {path}")
        densities = read_tensors(folder / "features.safetensors")
        shapes = {label: list(density.shape) for label, density in densities.items()}
        is_share = all(((one >= 0) & (one <= 1)).all() for one in densities.values())
        if not is_share or shapes != {row.label: [row.d_sae] for row in report.rows}:
            raise ValueError(
                f"{folder / 'features.safetensors'} does not hold a density of every latent in "
                "report.json: one of the two is damaged, or of another report."
            )
        d_sae = {name: len(density) for name, density in densities.items()}
        views, texts = read_views(folder, n_shown, d_sae) if n_shown else ({}, {})
        return replace(report, densities=densities, views=views, token_texts=texts)


def report_folder(folder: str | Path) -> Path:
    """The folder that a report is in: this one, or `report` in that of a run.

    Raises:
        FileNotFoundError: Neither holds a report.
    """
    folder = Path(folder)
    for place in (folder, folder / "report"):
        if (place / "report.json").is_file():
            return place
    raise FileNotFoundError(f"{folder} holds no report: report.json is missing.")


def table_line(cells: Sequence[str], columns: Mapping[str, int]) -> str:
    """A line of a text table whose columns are so wide; the first is set to the left."""
    first, *others = zip(cells, columns.values(), strict=True)
    return f"{first[0]:<{first[1]}} " + " ".join(f"{cell:>{width}}" for cell, width in others)


def label(hook_name: str, expansion_factor: float, seed: int) -> str:
    """What a dictionary is called in the files of a report."""
    return f"{hook_name}/x{expansion_factor:g}-seed{seed}"


def layer_number(hook_name: str) -> int | None:
    """The first number in a hook's name: 3 for "blocks.3.hook_resid_post"."""
    found = re.search(r"\d+", hook_name)
    return int(found.group()) if found else None
