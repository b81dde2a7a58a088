"""Several reports side by side: the same dictionary of each, line below line."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saefeat.report.record import COLUMNS, Report, Row, report_folder, table_line


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
        hook, *others = COLUMNS.items()
        columns = dict([hook, ("report", max(6, *map(len, self.reports))), ("kind", 14), *others])
        header = table_line(list(columns), columns)
        lines = [
            f"{name}: {report.model or 'activations'}, {report.n_tokens:,} held-out tokens"
            for name, report in self.reports.items()
        ]
        lines += [header, "-" * len(header)]
        for name, row in self.rows:
            first, *cells = row.cells
            lines.append(table_line([first, name, row.architecture, *cells], columns))
        if len({report.n_tokens for report in self.reports.values()}) > 1:
            lines.append(
                "Alive latents grow with the tokens that were read, which differ here: measure on "
                "equal numbers."
            )
        return "\n".join(lines)


def read_reports(
    folders: Sequence[Path], out: Path | None = None, page: bool = False
) -> Report | Comparison:
    """The report in a folder, or a comparison of those in several.

    Args:
        folders: Where `Report.load` finds them.
        out: A new folder to write a single report to.
        page: Whether to make its `report.html` again where it is.

    Raises:
        FileNotFoundError: A folder holds no report.
        ValueError: No folder is given, one is given twice, or several with `out` or `page`.
    """
    one_only = out is not None or page
    if not folders or len(set(folders)) < len(folders) or (one_only and len(folders) > 1):
        raise ValueError(
            "Give the folder of a report, or several different ones to compare them; --out and "
            f"--page write a single report. Got {len(folders)} folders."
        )
    reports = {str(folder): Report.load(folder) for folder in folders}
    if len(reports) > 1:
        return Comparison(reports=reports)
    (report,) = reports.values()
    if out is not None:
        report.save(out)
    if page:
        report.save_page(report_folder(folders[0]))
    return report
