"""`rtdetr validate`: check a dataset, and write a repaired, split or converted copy."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.select import output_file, parse_size
from rtdetr_cli.config.settings import DATA_HELP, MAX_SEED
from rtdetr_cli.datasets.codes import CODES, find_code
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.files import PARTIAL
from rtdetr_cli.text import counted, printable, suggest, tally

if TYPE_CHECKING:
    from rtdetr_cli.checks.doctor import Report
    from rtdetr_cli.checks.repair.plan import LeftOut

MISSING_LABELS = ("drop", "empty")
FORMATS = ("coco", "yolo", "voc")
MAX_LEFT_OUT = 10  # images listed after --fix
FIRST_WIDTH = 140  # characters of the column `first`
CHANGED = {
    "left_out": {"box-zero-size": "box", "label-orphan": "label file"},
    "clipped": {"box-partly-outside": "box", "label-beyond-one": "box"},
}
"""What --resplit and --convert change in a dataset without errors: code -> noun."""

DROPPED = {
    "label-missing": ("unlabelled", "keep_unlabelled", "without a label file"),
    "image-elsewhere": ("outside", "allow_outside", "outside the dataset's folder (--allow-outside copies them)"),
}
"""Images that --resplit and --convert leave out: code -> JSON key, what keeps them, and reason."""


def validate(
    data: Annotated[Path | None, typer.Argument(help=DATA_HELP, show_default=False)] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, if they are not next to the annotations.")
    ] = None,
    imgsz: Annotated[
        str, typer.Option(help="Input size that decides which objects are tiny: 640, or height first 480x640.")
    ] = "640",
    fast: Annotated[bool, typer.Option("--fast", help="Check the annotations only; decode no image.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 3 on warnings too.")] = False,
    fix: Annotated[
        Path | None, typer.Option(help="Write a repaired copy, with a list of all changes, to this new folder.")
    ] = None,
    resplit: Annotated[
        str | None,
        typer.Option(help="Write leak-free splits with these fractions, such as 0.8,0.2 or 0.7,0.2,0.1, to --to."),
    ] = None,
    convert: Annotated[str | None, typer.Option(help="Write the dataset as coco, yolo or voc to --to.")] = None,
    to: Annotated[Path | None, typer.Option(help="New folder for --resplit and --convert.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed of --resplit.")] = 0,
    missing_labels: Annotated[
        str,
        typer.Option(help="Images without a label file in the copy: drop (leave them out) or empty (no objects)."),
    ] = "drop",
    keep_truncated: Annotated[
        bool,
        typer.Option(
            "--keep-truncated", help="With --fix, keep images of which at most a quarter is missing, in gray."
        ),
    ] = False,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Copy images from outside the dataset's folder too.")
    ] = False,
    explain: Annotated[str | None, typer.Option(help="Explain the code of a finding; `all` lists the codes.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the report as one HTML file, with up to 500 images and 3,000 findings."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the full report as one JSON document on one line.")
    ] = False,
) -> int:
    """Check a dataset: every annotation, and every image by decoding it."""
    if explain is not None:
        _explain(explain, as_json)
        return 0
    if data is None:
        raise UsageError("no dataset given", hint="rtdetr validate my-dataset/", code="usage")

    size = parse_size(imgsz)
    fractions = _fractions(resplit) if resplit is not None else None
    _check_choices(convert, missing_labels, html)
    _refuse_clashes(data, to, fix, writes=convert is not None or fractions is not None)
    _refuse_unused(keep_truncated and (fix is None or fast), allow_outside and fix is None and to is None)

    from rtdetr_cli.checks.doctor import examine

    report = examine(
        data,
        images=images,
        imgsz=size,
        decode=not fast,
        processes=True,
        progress=terminal.progress,
        keep_truncated=keep_truncated,
    )
    document: dict[str, Any] = report.to_json()
    failed = _has_failed(report, strict)
    if not as_json:
        _show(report)
    if html is not None:
        from rtdetr_cli.checks.page import write_page

        write_page(report, html)
        document["html"] = str(html)
        if not as_json:
            terminal.say(f"report  {html}")
    kept, copy = {"keep_unlabelled": missing_labels == "empty", "allow_outside": allow_outside}, None
    if fix is not None:
        failed, copy = _fix(report, fix, kept, keep_truncated, document, as_json, strict)
    if to is not None:
        copy = _write(report, images, fractions, convert, to, seed, kept, document, as_json)
    if as_json:
        terminal.emit_json(document)
    else:
        _show_next(report, images, copy, failed)
    return DataError.exit_code if failed else 0


def _has_failed(report: Report, strict: bool) -> bool:
    counts = report.counts()
    return bool(counts["error"] or (strict and counts["warning"]))


def _check_choices(convert: str | None, missing_labels: str, html: Path | None) -> None:
    if html is not None:
        output_file(html, "--html")
    if convert is not None and convert not in FORMATS:
        raise UsageError(f"--convert {convert} is not a dataset format", hint=f"--convert {'|'.join(FORMATS)}")
    if missing_labels not in MISSING_LABELS:
        raise UsageError(f"--missing-labels {missing_labels}: expected drop or empty", hint="--missing-labels drop")


def _refuse_unused(keep_truncated: bool, allow_outside: bool) -> None:
    if keep_truncated:
        raise UsageError("--keep-truncated needs --fix, and images decoded", hint="--fix DIR --keep-truncated")
    if allow_outside:
        raise UsageError("--allow-outside needs --fix, --convert or --resplit", hint="--fix DIR --allow-outside")


def _refuse_clashes(data: Path, to: Path | None, fix: Path | None, *, writes: bool) -> None:
    if writes and to is None:
        raise UsageError("--convert and --resplit need a new folder", hint="--to DIR")
    if to is not None and not writes:
        raise UsageError("--to needs --convert or --resplit", hint="--convert coco --to DIR")
    if writes and fix is not None:
        raise UsageError(
            "--fix cannot be combined with --convert or --resplit", hint="repair first, then convert the copy"
        )
    for flag, folder in (("--to", to), ("--fix", fix)):
        if folder is None:
            continue
        if folder.exists() and (not folder.is_dir() or any(path.name != PARTIAL for path in folder.iterdir())):
            raise UsageError(f"{flag} {folder} is not empty", hint="choose a new folder")
        if data.is_dir() and folder.resolve().is_relative_to(data.resolve()):
            raise UsageError(f"{flag} {folder} is inside the dataset", hint="choose a folder elsewhere")


def _fractions(text: str) -> tuple[float, ...]:
    try:
        fractions = tuple(float(part) for part in text.split(","))
    except ValueError:
        fractions = ()
    if len(fractions) not in (2, 3) or not all(0 < f < 1 for f in fractions) or abs(sum(fractions) - 1) > 1e-3:
        raise UsageError(
            f"--resplit {text}: expected two or three fractions that add up to 1", hint="--resplit 0.8,0.2"
        )
    return fractions


def _explain(code: str, as_json: bool) -> None:
    if code == "all":
        if as_json:
            terminal.emit_json({"codes": [asdict(c) for c in CODES.values()]})
        else:
            terminal.table(("severity", "code", "finding"), [(c.severity, c.code, c.title) for c in CODES.values()])
        return
    entry = find_code(code)
    if entry is None:
        raise UsageError(f"--explain {code}: unknown code{suggest(code, CODES)}", hint="--explain all lists the codes")
    if as_json:
        terminal.emit_json(asdict(entry))
        return
    terminal.out(f"{entry.code} ({entry.severity}): {entry.title}\n")
    terminal.out(entry.explanation)
    terminal.out(f"\nwhat to do: {entry.hint}")
    terminal.out(f"--fix:      {entry.repair or 'changes nothing'}")


def _show_next(report: Report, images: Path | None, copy: Path | None, failed: bool) -> None:
    """Print the command that comes next: train, or repair what fails."""
    from rtdetr_cli.checks.repair import repairable

    if copy is not None:
        terminal.next_step("rtdetr", *(("validate", copy) if failed else ("train", "--data", copy)))
    elif not failed:
        if repairable(report):
            terminal.give_hint(f"{shlex.join(_fix_command(report, images))} writes a repaired copy")
        folder = () if images is None else ("--images", images)
        terminal.next_step("rtdetr", "train", "--data", report.raw.source, *folder)
    elif repairable(report):
        terminal.next_step(*_fix_command(report, images))


def _fix_command(report: Report, images: Path | None) -> list[str]:
    """Return the command that writes a repaired copy to a new folder, outside the dataset."""
    home = Path("..") if Path.cwd().is_relative_to(report.raw.folder.resolve()) else Path()
    names = (f"{report.raw.name}-fixed{number or ''}" for number in count())
    out = next(home / name for name in names if not (home / name).exists())
    folder = ["--images", str(images)] if images is not None else []
    return ["rtdetr", "validate", str(report.raw.source), *folder, "--fix", str(out)]


def _show(report: Report) -> None:
    """Print a table with one row per code and its first finding; harmless notes share a line."""
    from rtdetr_cli.checks.load import format_finding, unlabelled_note

    facts = report.summary()
    order = sorted(facts["splits"].items(), key=lambda item: ("train", "val", "test", item[0]).index(item[0]))
    splits = ", ".join(f"{name} {part['pictures']:,}" for name, part in order) or "no split"
    terminal.out(
        f"{printable(facts['name'])} ({facts['format']}): {counted(facts['pictures'], 'image')} ({splits}), "
        f"{counted(facts['boxes'], 'box')}, {counted(facts['classes'], 'class')}"
        + ("" if report.decoded else "; images not decoded (--fast)")
        + (f"; unpacked in {report.raw.folder}" if report.raw.source.suffix.lower() == ".zip" else "")
    )
    rows, harmless = [], []
    for code, findings in report.by_code().items():
        finding = findings[0]
        if finding.severity == "info" and CODES[code].harm == "none":
            harmless.append(f"{CODES[code].title} ({len(findings):,}, {code})")
            continue
        first = format_finding(finding)
        if len(first) > FIRST_WIDTH:
            first = first[: FIRST_WIDTH - 3] + "..."
        rows.append((finding.severity, code, len(findings), first))
    if rows:
        terminal.table(("severity", "code", "count", "first"), rows)
    if harmless:
        terminal.out(f"harmless notes: {', '.join(harmless)}")
    counts = report.counts()
    verdict = "training refuses this dataset until the errors are fixed" if counts["error"] else "ready for training"
    terminal.out(f"{tally(counts)}: {verdict}")
    if note := unlabelled_note(report.findings):
        terminal.warn(f"{note}; copies leave them out, unless --missing-labels empty keeps them without objects")
    if rows:
        terminal.give_hint(f"rtdetr validate --explain {rows[0][1]}")


def _fix(
    report: Report,
    out: Path,
    kept: dict[str, bool],
    keep_truncated: bool,
    document: dict[str, Any],
    as_json: bool,
    strict: bool,
) -> tuple[bool, Path]:
    """Write the repaired copy and check it; return whether it still fails, and the path to train on."""
    from rtdetr_cli.checks.doctor import examine
    from rtdetr_cli.checks.repair import repair

    repaired = repair(report, out, **kept)
    report_of_copy = examine(repaired.data, imgsz=report.imgsz, decode=report.decoded)
    counts = report_of_copy.counts()
    document["fix"] = {
        "out": str(out),
        "data": str(repaired.data),
        "patch": str(repaired.changes_file),
        "changes": repaired.changes,
        "not_repaired": repaired.not_repaired,
        "left_out": [asdict(left) for left in repaired.left_out],
        "counts": counts,
    }
    if not as_json:
        form = " (written as COCO)" if repaired.rewritten else ""
        terminal.out(f"repaired copy: {repaired.data}{form}")
        terminal.out(f"changes: {_by_code(repaired.changes) or 'none'} (listed in {repaired.changes_file})")
        _show_left_out(repaired.left_out, keep_truncated=keep_truncated)
        if repaired.not_repaired:
            terminal.out(f"not repaired: {_by_code(repaired.not_repaired)}")
        terminal.out(f"the copy has {tally(counts)}")
    return _has_failed(report_of_copy, strict), repaired.data


def _show_left_out(images: Sequence[LeftOut], *, keep_truncated: bool) -> None:
    if images:
        boxes = counted(sum(left.boxes for left in images), "box")
        terminal.out(f"left out: {counted(len(images), 'image')} with {boxes}")
    for left in images[:MAX_LEFT_OUT]:
        terminal.out(f"  {left.image} ({left.split}, {counted(left.boxes, 'box')}): {left.code}")
    if len(images) > MAX_LEFT_OUT:
        terminal.out(f"  and {len(images) - MAX_LEFT_OUT:,} more")
    if any(left.code == "image-elsewhere" for left in images):
        terminal.say("hint: --allow-outside copies images from outside the dataset's folder")
    if not keep_truncated and any(left.code == "image-truncated" for left in images):
        terminal.say("hint: --keep-truncated keeps truncated images of which at most a quarter is missing")


def _by_code(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {code}" for code, count in counts.items())


def _write(
    report: Report,
    images: Path | None,
    fractions: tuple[float, ...] | None,
    convert: str | None,
    to: Path,
    seed: int,
    kept: dict[str, bool],
    document: dict[str, Any],
    as_json: bool,
) -> Path:
    """Write the dataset to a new folder, with new splits or in another format; return the path to train on.

    Raises:
        DataError: it has errors.
    """
    from rtdetr_cli.checks.repair import repairable
    from rtdetr_cli.datasets.splits import to_splits
    from rtdetr_cli.datasets.write import write_dataset

    dropped = report.drop_images(*(code for code, (_, option, _) in DROPPED.items() if not kept[option]))
    document |= {DROPPED[code][0]: count for code, count in dropped.items()}
    errors = report.counts()["error"]
    if errors:
        raise DataError(
            f"{report.raw.name} has {counted(errors, 'error')}, so it is not written",
            hint=f"{shlex.join(_fix_command(report, images))}, then repeat this with the copy"
            if repairable(report)
            else "",
            code=next(f.code for f in report.findings if f.severity == "error"),
        )
    parts = to_splits(report.raw).parts
    facts: dict[str, Any] = {}
    if fractions is not None:
        from rtdetr_cli.checks.split import resplit

        new = resplit(report, parts, fractions, seed=seed)
        parts = new.parts
        facts = {"clusters": new.clusters, "groups": new.groups, "largest_cluster": new.largest, "seed": seed}
    format_name = convert or (report.raw.format if report.raw.format in FORMATS else "coco")
    data = write_dataset(parts, format_name, to)
    counts = {name: len(part) for name, part in parts.items()}
    found = Counter(finding.code for finding in report.findings)
    changed = {what: {c: found[c] for c in codes if c in found} for what, codes in CHANGED.items()}
    document["written"] = {"format": format_name, "data": str(data), "splits": counts, **changed, **facts}
    if as_json:
        return data
    sizes = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    groups = facts.get("groups")
    grouped = f"; {counted(groups, 'group')} of related images kept in one split" if groups else ""
    terminal.out(f"written: {data} ({format_name}; {sizes}{grouped})")
    for what, by_code in changed.items():
        if by_code:
            items = (f"{counted(count, CHANGED[what][code])} ({code})" for code, count in by_code.items())
            terminal.out(f"{what.replace('_', ' ')}: {', '.join(items)}")
    for key, _, why in DROPPED.values():
        if count := document.get(key):
            terminal.out(f"left out: {counted(count, 'image')} {why}")
    return data
