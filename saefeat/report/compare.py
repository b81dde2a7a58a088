"""Several reports side by side: the same dictionary of each, line below line."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saefeat.report.record import Report, Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Rows of several reports, those of one hook, width and seed together. `print` it."""

    reports: Mapping[str, Report]
    """Reports by what they are called."""

    @property
    def rows(self) -> list[tuple[str, Row]]:
        """Each row with the name of its report: in the order of the first report, then others."""
        found: dict[tuple[str, float, int], list[tuple[str, Row]]] = {}
        for name, report in self.reports.items():
            for row in report.rows:
                key = (row.hook_name, row.expansion_factor, row.seed)
                found.setdefault(key, []).append((name, row))
        return [one for together in found.values() for one in together]

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "reports": {
                name: {"model": report.model, "n_tokens": report.n_tokens}
                for name, report in self.reports.items()
            },
            "rows": [{"report": name, **asdict(row)} for name, row in self.rows],
        }

    def __str__(self) -> str:
        width = max(6, *map(len, self.reports))
        lines = [
            f"{name}: {report.model or 'activations'}, {report.n_tokens:,} held-out tokens"
            for name, report in self.reports.items()
        ]
        header = (
            f"{'hook':<28} {'report':<{width}} {'kind':<14} {'latents':>8} {'seed':>4} "
            f"{'alive':>7} {'per neuron':>10} {'eff.':>7} {'L0':>6} {'FVU':>6} {'CE rec.':>7}"
        )
        lines += [header, "-" * len(header)]
        for name, row in self.rows:
            recovered = row.ce_loss_recovered
            lines.append(
                f"{row.hook_name:<28} {name:<{width}} {row.architecture:<14} {row.d_sae:>8,} "
                f"{row.seed:>4} {row.n_alive:>7,} {row.features_per_neuron:>10.2f} "
                f"{row.effective_features:>7,.0f} {row.l0:>6.1f} {row.fvu:>6.3f} "
                f"{'–' if recovered is None else f'{recovered:.3f}':>7}"
            )
        if len({report.n_tokens for report in self.reports.values()}) > 1:
            lines.append(
                "Alive latents grow with the tokens that were read, which differ here: measure on "
                "equal numbers."
            )
        return "\n".join(lines)


def read_reports(folders: Sequence[Path], out: Path | None = None) -> Report | Comparison:
    """The report in a folder, or a comparison of those in several.

    Args:
        folders: Where `Report.load` finds them.
        out: A new folder to write a single report to.

    Raises:
        FileNotFoundError: A folder holds no report.
        ValueError: No folder is given, one is given twice, or several with `out`.
    """
    if not folders or len(set(folders)) < len(folders) or (out is not None and len(folders) > 1):
        raise ValueError(
            "Give the folder of a report, or several different ones to compare them; --out writes "
            f"a single report. Got {len(folders)} folders."
        )
    reports = {str(folder): Report.load(folder) for folder in folders}
    if len(reports) > 1:
        return Comparison(reports=reports)
    (report,) = reports.values()
    if out is not None:
        report.save(out)
    return report
