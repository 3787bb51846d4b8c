"""Numbers as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

__all__ = ["markdown", "median", "number", "spread"]


def number(value: float) -> str:
    """Three digits that mean something: 0.0123, 1.23, 12.3, 1234."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """The median and what lay farthest from it: `54.1 (53.0-55.2)`."""
    low, middle, high = number(min(values)), number(median(values)), number(max(values))
    return middle if low == high else f"{middle} ({low}-{high})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its columns aligned for whoever reads it as text; the first is words, the others are numbers."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width) if not at else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])
