"""The benchmark as a picture: time over bytes, a line for each library, an axis for each operation and type."""

import io
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pneumo.comm.bench.cases import size_text
from pneumo.study.results import write_atomic

COLOURS = {
    **{"memcpy": "0.5", "pneumo": "tab:red", "gloo": "tab:blue", "horovod": "tab:orange"},
    **{"mpi": "tab:green", "mpi_plain": "tab:olive", "deepspeed": "tab:purple"},
}


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Write the picture of the JSON file's content; the format is the path's. Raises PneumoError."""
    figures = import_module("matplotlib.figure")
    rows = [row for row in content["rows"] if row["bytes"]]
    panels = list(dict.fromkeys((row["op"], row["dtype"]) for row in rows)) or [("nothing", "measured")]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = figures.Figure(figsize=(1.5 + 5 * columns, 4.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, (op, dtype) in zip(axes, panels, strict=False):
        _panel(axis, [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)])
        axis.set_title(f"{op} of {dtype}, {content['ranks']} ranks on {content['cores']} cores", fontsize=10)
    for axis in list(axes)[len(panels) :]:
        axis.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=150)
    write_atomic(path, picture.getvalue())


def _panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    sizes = sorted({row["bytes"] for row in rows})
    for name in dict.fromkeys(row["library"] for row in rows):
        mine = sorted((row for row in rows if row["library"] == name), key=lambda row: int(row["bytes"]))
        middle = [row["median_us"] for row in mine]
        spread = [[r["median_us"] - r["low_us"] for r in mine], [r["high_us"] - r["median_us"] for r in mine]]
        style = "--" if name in ("memcpy", "mpi_plain") else "-"
        axis.errorbar(
            [row["bytes"] for row in mine],
            middle,
            yerr=spread,
            label=name.replace("_", " "),
            color=COLOURS[name],
            linestyle=style,
            marker="o",
            markersize=3,
            capsize=2,
        )
    if not rows:
        return
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [size_text(size) for size in sizes], fontsize=8)
    axis.set_xlabel("bytes")
    axis.set_ylabel("us a call, median with 95 % interval")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
