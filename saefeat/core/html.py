"""Small tables for notebooks."""

from collections.abc import Iterable, Sequence
from html import escape


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    notes: Iterable[str] = (),
) -> str:
    """An HTML table that follows the colours of the page it is on; all text is escaped.

    Args:
        caption: What stands above it.
        columns: Their names; none leaves the line of names out.
        rows: A cell for each column. The first one is set to the left, numbers to the right.
        notes: Lines below it.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = [f"<tr>{head}</tr>"] if columns else []
    for row in rows:
        first, *others = (escape(str(cell)) for cell in row)
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<tr><th scope="row" style="text-align: left">{first}</th>{cells}</tr>')
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return (
        f'<table><caption style="text-align: left">{escape(caption)}</caption>{"".join(lines)}'
        f"</table>{below}"
    )
