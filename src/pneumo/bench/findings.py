"""What a benchmark finds: the figures of its JSON file, and the tables that say them to people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from pneumo.study.cells import add_columns, legend, new_table, put
from pneumo.study.statistics import Estimate


@dataclass(slots=True)
class Findings:
    """Figures by name, in the order of their measurement.

    `about` is what they depend on (JSON values). The file holds `rows` ({name, value, unit}, and low and high where
    there is an interval) and `ratios` ({name, median, low, high}).
    """

    about: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[dict[str, Any]] = field(default_factory=list)
    _shown: list[RenderableType] = field(default_factory=list)

    def add(self, name: str, value: Estimate | float, unit: str) -> None:
        """Add a figure, or an estimate with its interval."""
        if isinstance(value, Estimate):
            found = {"low": value.low, "high": value.high, "confidence": value.confidence}
            self.rows.append({"name": name, "value": value.value, "unit": unit, **found})
        else:
            self.rows.append({"name": name, "value": value, "unit": unit})

    def add_ratio(self, name: str, ratio: Estimate) -> None:
        """Add a ratio with its interval."""
        limits = {"low": ratio.low, "high": ratio.high, "confidence": ratio.confidence}
        self.ratios.append({"name": name, "median": ratio.value, **limits})

    def table(self, title: str, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        """Show a table; headers are as of `add_columns`."""
        table = new_table("")
        table.title = None
        add_columns(table, *headers)
        for line in lines:
            table.add_row(*line)
        self._shown += [Text(title, style="bold"), table, Text()]

    def explain(self, lines: Sequence[tuple[str, str]]) -> None:
        """Show how to read what stands above."""
        self._shown += [legend(lines), Text()]

    def encode(self) -> bytes:
        """The JSON file."""
        content = {**self.about, "rows": self.rows, "ratios": self.ratios}
        return json.dumps(content, indent=1).encode() + b"\n"

    def show(self, console: Console) -> None:
        """Print everything."""
        for item in self._shown:
            put(console, item)


def signed(value: Estimate, digits: int = 2) -> str:
    """A difference and its limits, each with its sign."""
    return f"{value.value:+.{digits}f} {value.low:+.{digits}f}..{value.high:+.{digits}f}"


def per_cent(ratio: Estimate) -> str:
    """A ratio and its limits as what is above or below 1, in per cent."""
    low, value, high = (100 * (part - 1) for part in (ratio.low, ratio.value, ratio.high))
    return f"{value:+.2f} {low:+.2f}..{high:+.2f}"
