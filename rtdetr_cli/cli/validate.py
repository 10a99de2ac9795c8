"""`rtdetr validate`: the dataset doctor."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from rtdetr_cli.checks.doctor import Report
    from rtdetr_cli.cli.terminal import Progress

FORMATS = ("coco", "yolo", "voc")
CHANGED = {
    "left_out": {"box-zero-size": "box", "label-orphan": "label file"},
    "clipped": {"box-partly-outside": "box", "label-beyond-one": "box"},
}
"""What of a dataset without errors is not written as it was: code -> what it concerns. Every image is written."""


def validate(
    data: Annotated[
        Path | None,
        typer.Argument(
            help="COCO JSON, Roboflow folder, data.yaml or VOC folder; or a patch.json, undone into --fix.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if it is not beside the labels.")] = None,
    imgsz: Annotated[str, typer.Option(help="Network size, for what counts as tiny: 640, or height x width.")] = "640",
    fast: Annotated[bool, typer.Option("--fast", help="Look at labels only; decode no image.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Let warnings fail too.")] = False,
    fix: Annotated[
        Path | None, typer.Option(help="Write a repaired copy and a patch.json that undoes it into this new folder.")
    ] = None,
    resplit: Annotated[
        str | None, typer.Option(help="Make leak-free splits of these shares (0.8,0.2 or 0.7,0.2,0.1) into --to.")
    ] = None,
    convert: Annotated[str | None, typer.Option(help="Write the dataset as coco, yolo or voc into --to.")] = None,
    to: Annotated[Path | None, typer.Option(help="New folder for --resplit and --convert.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of --resplit.")] = 0,
    explain: Annotated[str | None, typer.Option(help="Explain a finding's code, or list all with `all`.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the report as one self-contained page, of at most 500 images and 3,000 findings."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the full report as JSON.")] = False,
) -> int:
    """Check a dataset: every label, and every image to its last pixel."""
    if explain is not None:
        return _explain(explain, as_json)
    if data is None:
        raise UsageError("DATA is missing", hint="rtdetr validate my.json", code="usage")
    from rtdetr_cli.cli.select import parse_size

    size = parse_size(imgsz)
    shares = _shares(resplit) if resplit is not None else None
    _refuse_clashes(convert, to, shares, fix, html, data)

    if data.name == "patch.json" and data.is_file():
        return _undo(data, fix, as_json)

    from rtdetr_cli.checks.doctor import examine
    from rtdetr_cli.cli import terminal

    with ExitStack() as stack:
        report = examine(
            data, images=images, imgsz=size, decode=not fast, processes=True, progress=_Images(stack).advance
        )

    document: dict[str, Any] = report.to_json()
    if not as_json:
        _show(report, images, fixing=fix is not None)
    counts = report.counts()
    failed = bool(counts["error"] or (strict and counts["warning"]))
    if html is not None:
        from rtdetr_cli.checks.page import write_page

        write_page(report, html)
        document["html"] = str(html)
        if not as_json:
            terminal.say(f"page  {html}")
    if fix is not None:
        failed = _fix(report, fix, document, as_json, strict)
    if shares is not None or convert is not None:
        assert to is not None
        _write(report, shares, convert, to, seed, document, as_json)
    if as_json:
        terminal.emit_json(document)
    return 3 if failed else 0


class _Images:
    """Shows how many images are decoded, from the first one on."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack, self.done = stack, 0
        self.bar: Progress | None = None

    def advance(self, done: int, total: int) -> None:
        """Say that `done` of `total` are decoded."""
        from rtdetr_cli.cli import terminal

        if self.bar is None:
            self.bar = self.stack.enter_context(terminal.progress(total, "images"))
        self.bar.advance(done - self.done)
        self.done = done


def _refuse_clashes(
    convert: str | None,
    to: Path | None,
    shares: tuple[float, ...] | None,
    fix: Path | None,
    html: Path | None,
    data: Path,
) -> None:
    if convert is not None and convert not in FORMATS:
        raise UsageError(f"--convert {convert} is not a format", hint=f"--convert {'|'.join(FORMATS)}")
    writes = convert is not None or shares is not None
    if writes and to is None:
        raise UsageError("--convert and --resplit need a new folder", hint="--to DIR")
    if to is not None and not writes:
        raise UsageError("--to does nothing without --convert or --resplit", hint="--convert coco --to DIR")
    if writes and fix is not None:
        raise UsageError(
            "--fix does not go together with --convert or --resplit", hint="repair first, then convert the copy"
        )
    for flag, folder in (("--to", to), ("--fix", fix)):
        if folder is None:
            continue
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{flag} {folder} is not empty", hint="name a new folder")
        inside = data if data.is_dir() else data.parent
        if data.exists() and folder.resolve().is_relative_to(inside.resolve()) and data.is_dir():
            raise UsageError(f"{flag} {folder} lies inside the dataset", hint="name a folder elsewhere")
    if html is not None:
        from rtdetr_cli.cli.select import output_file

        output_file(html, "--html")


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) not in (2, 3) or not all(0 < s < 1 for s in shares) or abs(sum(shares) - 1) > 1e-3:
        raise UsageError(f"--resplit {text} are not two or three shares that add up to 1", hint="--resplit 0.8,0.2")
    return shares


# ---------------------------------------------------------------------------------------------------------------------


def _explain(code: str, as_json: bool) -> int:
    import difflib

    from rtdetr_cli.cli import terminal
    from rtdetr_cli.datasets.codes import CODES, find_code

    if code == "all":
        if as_json:
            terminal.emit_json({"codes": [_entry(c) for c in CODES.values()]})
        else:
            terminal.table(("severity", "code", "what"), [(c.severity, c.code, c.title) for c in CODES.values()])
        return 0
    entry = find_code(code)
    if entry is None:
        near = difflib.get_close_matches(code, CODES, n=1)
        raise UsageError(
            f"--explain {code} is not a code", hint=f"--explain {near[0]}" if near else "--explain all lists them"
        )
    if as_json:
        terminal.emit_json(_entry(entry))
        return 0
    terminal.out(f"{entry.code} ({entry.severity}): {entry.title}\n")
    terminal.out(entry.explanation)
    terminal.out(f"\nwhat helps: {entry.hint}")
    terminal.out(f"--fix:      {entry.repair or 'leaves it as it is'}")
    return 0


def _entry(entry: Any) -> dict[str, str]:
    return {
        "code": entry.code,
        "severity": entry.severity,
        "title": entry.title,
        "explanation": entry.explanation,
        "hint": entry.hint,
        "repair": entry.repair,
    }


def _show(report: Report, images: Path | None, *, fixing: bool) -> None:
    """Print the short table: one row a code, with the first place it was found."""
    from rtdetr_cli.checks.load import format_finding
    from rtdetr_cli.checks.repair import repairable
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.text import counted, tally

    facts = report.summary()
    splits = ", ".join(f"{name} {part['pictures']:,}" for name, part in facts["splits"].items()) or "no split"
    terminal.out(
        f"{facts['name']} ({facts['format']}): {counted(facts['pictures'], 'image')} ({splits}), "
        f"{counted(facts['boxes'], 'box')}, {counted(facts['classes'], 'class')}"
        + ("" if report.decoded else "; images not decoded (--fast)")
    )
    rows = []
    for code, positions in report.by_code().items():
        worst = report.findings[positions[0]]
        first = format_finding(worst)
        rows.append((worst.severity, code, len(positions), first if len(first) <= 140 else first[:137] + "..."))
    if rows:
        terminal.table(("severity", "code", "count", "first"), rows)
    counts = report.counts()
    verdict = "it can be trained on" if not counts["error"] else "training refuses it until the errors are gone"
    terminal.out(f"{tally(counts)}: {verdict}")
    if rows:
        code = rows[0][1]
        hint = f"rtdetr validate --explain {code}"
        if not fixing and repairable(report):
            elsewhere = f" --images {images}" if images is not None else ""
            hint += f"; rtdetr validate {report.raw.source}{elsewhere} --fix OUT writes a repaired copy"
        terminal.say(f"hint: {hint}")


def _fix(report: Report, out: Path, document: dict[str, Any], as_json: bool, strict: bool) -> bool:
    """Write the repaired copy, look at it again, and tell whether it still fails."""
    from rtdetr_cli.checks.doctor import examine
    from rtdetr_cli.checks.repair import repair
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.text import tally

    done = repair(report, out)
    again = examine(done.data, imgsz=report.imgsz, decode=report.decoded)
    left = again.counts()
    document["fix"] = {
        "out": str(out),
        "data": str(done.data),
        "patch": str(done.patch),
        "changes": done.changes,
        "not_repaired": done.not_repaired,
        "counts": left,
    }
    if not as_json:
        changes = ", ".join(f"{count} {code}" for code, count in done.changes.items()) or "none"
        terminal.out(f"fixed copy: {done.data}; changes: {changes}")
        kept = ", ".join(f"{count} {code}" for code, count in done.not_repaired.items())
        if kept:
            terminal.out(f"not repaired: {kept}")
        terminal.out(f"the copy has {tally(left)}; undo: rtdetr validate {done.patch} --fix RESTORED")
    return bool(left["error"] or (strict and left["warning"]))


def _undo(patch: Path, to: Path | None, as_json: bool) -> int:
    from rtdetr_cli.checks.repair import undo
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.text import counted

    if to is None:
        raise UsageError("undoing a patch needs a new folder", hint=f"rtdetr validate {patch} --fix RESTORED")
    count = undo(patch, to)
    if as_json:
        terminal.emit_json({"undone": count, "out": str(to)})
    else:
        terminal.out(f"{counted(count, 'change')} undone: {to}")
    return 0


def _write(
    report: Report,
    shares: tuple[float, ...] | None,
    convert: str | None,
    to: Path,
    seed: int,
    document: dict[str, Any],
    as_json: bool,
) -> None:
    from rtdetr_cli.checks.repair import repairable
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.datasets.splits import to_splits
    from rtdetr_cli.datasets.write import write_dataset
    from rtdetr_cli.text import counted

    errors = report.counts()["error"]
    if errors:
        raise DataError(
            f"{report.raw.name} has {counted(errors, 'error')}, so it is not written anew",
            hint=f"rtdetr validate {report.raw.source} --fix OUT, then convert the copy" if repairable(report) else "",
            code=next(f.code for f in report.findings if f.severity == "error"),
        )
    splits = to_splits(report.raw)
    parts = {d.split: d for d in (splits.train, splits.val, splits.test) if d is not None}
    facts: dict[str, Any] = {}
    if shares is not None:
        from rtdetr_cli.checks.split import resplit

        made = resplit(report, parts, shares, seed=seed)
        parts = made.parts
        facts = {"clusters": made.clusters, "groups": made.groups, "largest_cluster": made.largest, "seed": seed}
    form = convert or {"roboflow": "coco"}.get(report.raw.format, report.raw.format)
    data = write_dataset(parts, form, to)
    counts = {name: len(part) for name, part in parts.items()}
    found = {code: len(positions) for code, positions in report.by_code().items()}
    changed = {what: {c: found[c] for c in codes if c in found} for what, codes in CHANGED.items()}
    document["written"] = {"format": form, "data": str(data), "splits": counts, **changed, **facts}
    if not as_json:
        told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        groups = facts.get("groups")
        extra = f"; images kept together in {counted(groups, 'group')}" if groups else ""
        terminal.out(f"written: {data} ({form}; {told}{extra})")
        for what, by_code in changed.items():
            if by_code:
                told_ = (f"{counted(n, CHANGED[what][code])} ({code})" for code, n in by_code.items())
                terminal.out(f"{what.replace('_', ' ')}: {', '.join(told_)}")
