"""The settings of a model that trade accuracy for speed: decoder layers, queries and input size."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from rtdetr_cli.config.image_size import STRIDE, parse_image_size
from rtdetr_cli.errors import UsageError
from rtdetr_cli.text import whole_number

SWEEPS = ("layers", "queries", "imgsz")
QUERY_SHARES = (1.0, 2 / 3, 1 / 3, 1 / 6)
SIZE_SHARES = (1.0, 0.75, 0.5)


@dataclass(frozen=True, slots=True)
class Setting:
    """One combination; None is the model's own value."""

    layers: int | None = None
    queries: int | None = None
    imgsz: tuple[int, int] | None = None


def parse_sweep(text: str) -> dict[str, list[str]]:
    """Read `layers,queries,imgsz`, each alone or with values: `layers=1/3,imgsz=320/480x640`.

    Raises:
        UsageError: an unknown or repeated name.
    """
    sweep: dict[str, list[str]] = {}
    for word in text.split(","):
        name, _, values = word.strip().partition("=")
        if name not in SWEEPS or name in sweep:
            problem = "is given twice" if name in sweep else "cannot be swept"
            raise UsageError(
                f"--sweep {text}: {name!r} {problem}",
                hint="--sweep layers,queries,imgsz, or with values: layers=1/2/3",
                code="sweep",
            )
        sweep[name] = [v for v in values.split("/") if v]
    return sweep


def sweep_settings(sweep: dict[str, list[str]], *, layers: int, queries: int, imgsz: tuple[int, int]) -> list[Setting]:
    """Return every combination, the model's own first.

    Args:
        sweep: from `parse_sweep`; a name without values gets some below the model's own.
        layers: the model's own number, which is the maximum.
        queries: likewise.
        imgsz: the model's own (height, width); other sizes may be larger.

    Raises:
        UsageError: a value that the model cannot use.
    """

    def counts(name: str, maximum: int, default: list[int]) -> list[int]:
        if name not in sweep:
            return [maximum]
        for value in sweep[name]:
            if not 1 <= (whole_number(value) or 0) <= maximum:
                raise UsageError(f"--sweep {name}={value}: this model has 1 to {maximum} {name}", code="sweep")
        return [int(value) for value in sweep[name]] or default

    sizes = [imgsz]
    if "imgsz" in sweep:
        height, width = ([max(STRIDE, round(n * s / STRIDE) * STRIDE) for s in SIZE_SHARES] for n in imgsz)
        try:
            sizes = [parse_image_size(value) for value in sweep["imgsz"]] or list(zip(height, width, strict=True))
        except ValueError as error:
            raise UsageError(f"--sweep imgsz={'/'.join(sweep['imgsz'])}: {error}", code="size") from None
    combinations = itertools.product(
        counts("layers", layers, list(range(layers, 0, -1))),
        counts("queries", queries, [max(1, round(queries * share)) for share in QUERY_SHARES]),
        sizes,
    )
    return list(dict.fromkeys([Setting(layers, queries, imgsz), *(Setting(*values) for values in combinations)]))
