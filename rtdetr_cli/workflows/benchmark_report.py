"""The rows of a benchmark as a table, a JSON document and a plot of AP over latency."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rtdetr_cli.evaluate.bootstrap import Interval
from rtdetr_cli.infer.timing import Spread
from rtdetr_cli.text import counted

SMALLEST_SPAN = 0.02  # of the AP axis of the plot


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    Attributes:
        precision: of the network: `fp32`, `fp16` or `int8`.
        imgsz: (height, width).
        layers, queries: that were used; None for a foreign graph, which does not state them.
        times: `timing.PARTS` to their spread.
        ap: AP of the split; None without a dataset.
        metrics: the twelve COCO metrics.
        difference: AP minus that of the first row, with its paired interval; None for the first row.
        front: True where no other row is both faster and more accurate.
    """

    model: str
    backend: str
    precision: str
    device: str
    imgsz: tuple[int, int]
    layers: int | None
    queries: int | None
    batch: int
    times: dict[str, Spread]
    ap: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    difference: Interval | None = None
    front: bool = False

    @property
    def latency(self) -> float:
        """Median of the total, in milliseconds."""
        return self.times["total"].median

    @property
    def images_per_second(self) -> float:
        """Throughput at the median latency."""
        return 1000 * self.batch / self.latency

    @property
    def size(self) -> str:
        """The input size as `640` or `480x640`."""
        height, width = self.imgsz
        return str(height) if height == width else f"{height}x{width}"

    @property
    def summary(self) -> str:
        """One line for people."""
        settings = [self.backend, self.precision, self.size]
        settings += [counted(self.layers, "layer")] if self.layers else []
        settings += [counted(self.queries, "query", "queries")] if self.queries else []
        ap = "" if self.ap is None else f", AP {self.ap:.3f}"
        unstable = " (unstable)" if self.times["total"].unstable else ""
        return f"{' '.join(settings)}: {self.latency:.1f} ms{unstable}{ap}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            **asdict(self),
            "imgsz": list(self.imgsz),
            "difference": None if self.difference is None else self.difference.to_json(),
            "pictures_per_second": self.images_per_second,
            "unstable": self.times["total"].unstable,
        }


def mark_front(rows: Sequence[Row]) -> list[Row]:
    """Mark the Pareto front: rows that no other row equals or beats in both AP and latency, and beats in one."""

    def beaten(row: Row, ap: float) -> bool:
        return any(
            other.ap is not None
            and other.ap >= ap
            and other.latency <= row.latency
            and (other.ap > ap or other.latency < row.latency)
            for other in rows
        )

    return [replace(row, front=row.ap is not None and not beaten(row, row.ap)) for row in rows]


def table_rows(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return the cells of each row by column; the model and the throughput are shown only where they say something."""
    several_models = len({row.model for row in rows}) > 1
    return [
        {
            **({"model": row.model} if several_models else {}),
            "backend": row.backend,
            "type": row.precision,
            "size": row.size,
            "layers": row.layers,
            "queries": row.queries,
            **{
                f"{name} ms\nmedian / p90": f"{spread.median:.1f} / {spread.p90:.1f}"
                + (" ~" if name == "total" and spread.unstable else "")
                for name, spread in zip(("pre", "network", "post", "total"), row.times.values(), strict=True)
            },
            **({"images/s": f"{row.images_per_second:.1f}"} if row.batch > 1 else {}),
            "AP": row.ap,
            "AP - first (95%)": row.difference and f"{row.difference.value:+.3f} ± {row.difference.half_width:.3f}",
            "best": "*" if row.front else "",
        }
        for row in rows
    ]


def drop_constant_columns(table: list[dict[str, object]]) -> tuple[list[dict[str, object]], str]:
    """Remove settings that are equal in all rows, so that the table fits a terminal; return them as text."""
    settings = ("type", "size", "layers", "queries")
    constant = {name: table[0][name] for name in settings if len({row[name] for row in table}) == 1}
    text = ", ".join(f"{name} {value}" for name, value in constant.items() if value is not None)
    return [{name: value for name, value in row.items() if name not in constant} for row in table], text


def write_files(folder: Path, rows: Sequence[Row], document: dict[str, Any]) -> dict[str, Path]:
    """Write the table (Markdown), the document (JSON) and, where AP is known, the plot (PNG) to an existing folder."""
    paths = {"table": folder / "benchmark.md", "json": folder / "benchmark.json"}
    paths["table"].write_text(_markdown(rows), encoding="utf-8")
    paths["json"].write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if any(row.ap is not None for row in rows):
        paths["plot"] = folder / "benchmark.png"
        draw_plot(paths["plot"], rows)
    return paths


def _markdown(rows: Sequence[Row]) -> str:
    def cell(value: object) -> str:
        text = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|")

    table = table_rows(rows)
    lines = [[column.replace("\n", ", ") for column in table[0]], ["---"] * len(table[0])]
    lines += [[cell(value) for value in row.values()] for row in table]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw AP over latency: a color per model and backend, the Pareto front connected and labelled."""
    from matplotlib.figure import Figure

    points = [(row, row.latency, row.ap) for row in rows if row.ap is not None]
    front = sorted((point for point in points if point[0].front), key=lambda point: point[1])
    batch = points[0][0].batch
    several_models = len({row.model for row, _, _ in points}) > 1
    figure = Figure(figsize=(9, 5.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    groups: dict[str, list[tuple[float, float]]] = {}
    for row, latency, ap in points:
        name = f"{row.backend} {row.precision}" + (f", {Path(row.model).name}" if several_models else "")
        groups.setdefault(name, []).append((latency, ap))
    for name, group in groups.items():
        axes.scatter([x for x, _ in group], [y for _, y in group], s=34, label=name, zorder=3)
    axes.plot(
        [latency for _, latency, _ in front],
        [ap for _, _, ap in front],
        color="0.35",
        linewidth=1,
        linestyle="--",
        drawstyle="steps-post",
        label="no other is faster and more accurate",
        zorder=2,
    )
    axes.set_xlabel(f"milliseconds for {counted(batch, 'image')}, file to boxes (median)")
    axes.set_ylabel("AP")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    low, high = axes.get_ylim()
    if high - low < SMALLEST_SPAN:  # exports of one model would look different
        middle = (low + high) / 2
        axes.set_ylim(middle - SMALLEST_SPAN / 2, middle + SMALLEST_SPAN / 2)
    _label_points(axes, front, points)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _label_points(axes: Any, front: list[tuple[Row, float, float]], points: list[tuple[Row, float, float]]) -> None:
    """Label points of the front, the most accurate first, and leave out labels that would overlap."""
    latencies = [latency for _, latency, _ in points]
    fastest, width = min(latencies), max(latencies) - min(latencies) or 1.0
    low, high = axes.get_ylim()
    labelled: list[tuple[float, float]] = []
    for row, latency, ap in reversed(front):
        if any(abs(latency - x) < 0.42 * width and abs(ap - y) < 0.045 * (high - low) for x, y in labelled):
            continue
        labelled.append((latency, ap))
        text = [row.size]
        text += [counted(row.layers, "layer")] if row.layers else []
        text += [counted(row.queries, "query", "queries")] if row.queries else []
        at_edge = latency > fastest + 0.8 * width
        axes.annotate(
            ", ".join(text),
            (latency, ap),
            xytext=(-6 if at_edge else 6, -11),
            textcoords="offset points",
            horizontalalignment="right" if at_edge else "left",
            fontsize=7.5,
            color="0.25",
        )
