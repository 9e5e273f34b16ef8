"""The table of every command that prints one: Markdown, with aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def render(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table in Markdown.

    Args:
        header: A title for each column.
        rows: A cell for each column.
        left: So many columns begin on the left; the others, which are figures, end on the right.
    """
    widths = [max(3, *(len(line[index]) for line in [header, *rows])) for index in range(len(header))]
    ruler = ["-" * width if index < left else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    return "\n".join(_join(line, widths, left) for line in [header, ruler, *rows])


def _join(line: Sequence[str], widths: Sequence[int], left: int) -> str:
    cells = [
        cell.ljust(width) if index < left else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    return f"| {' | '.join(cells)} |"
