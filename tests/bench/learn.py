"""Compare ways to train on few images: arms with the same seeds, every run kept in a ledger.

    python -m tests.bench.learn --arm recipe --set bccd,cards --seeds 10-14 --steps 260,600
    python -m tests.bench.learn --arm faster:lr=2e-3,ema_age=0.06 --seeds 0-2 --steps 260
    python -m tests.bench.learn --against earlier@ffe60e9 --arm default       # beside an earlier commit of ours
    python -m tests.bench.learn --arm recipe --summary               # only the paired differences, from the ledger
    python -m tests.bench.learn --arm default --arm recipe --split test  # once, at the very end

Steps are those of the preset's batch: an arm with half the batch sees the same images in twice the steps. An arm is a
list of `--set` words on top of the defaults; `ARMS` names some, `--arm name:key=value,...` adds one, and `name@COMMIT`
is trained by that commit's `rtdetr train` and measured like the others. The arm `--against` is run as well, and
differences are paired with it by set, steps and seed. A run starts from random weights and its figures are those of
the moving average after the last step: nothing is picked by them. Runs that the ledger already has for this code (the
last commit of `rtdetr_cli` and `presets`) are not repeated, so a command that was cut off goes on where it stopped.
Use `--commits` to count the rows of other commits too, where the change between them cannot matter.
docs/learning.md says which arms to believe: screen with seeds 0-2, confirm with 10-14.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from tests.bench.speed import harness
from tests.bench.speed.harness import ROOT, checkout, take_turn

DATA = ROOT.parent / "shared" / "data"
LEDGER = ROOT / "docs" / "learning" / "ledger.csv"
SETS = {"bccd": "bccd", "cards": "cards", "bccd-100": "bccd"}  # name -> folder; a number is that many training images
ARMS: dict[str, tuple[str, ...]] = {
    "default": (),
    "light": ("aug=light",),
    "recipe": ("aug=recipe",),
    "official": ("schedule=official",),
    "official-mended": (
        "schedule=official",
        "official.warmup_steps=50",
        "official.ema_decay=0.99",
        "official.ema_warmup=100",
        "precision=fp32",
    ),
    "official-warmup": ("schedule=official", "warmup=0.05"),
}


GAMMA = 8.0


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    settings: str  # `--set` words, separated by blanks
    preset: str
    imgsz: int
    set: str
    seed: int
    steps: int
    split: str


@dataclass(frozen=True)
class Row(Job):
    """One line of the ledger; counts are per image, at the threshold that `predict` would use.

    Duplicates are rescored with `GAMMA` in every arm; `AP_raw` is without.
    """

    commit: str
    AP_raw: float
    AP: float
    AP50: float
    APs: float | None
    duplicates: float
    false_positives: float
    seconds_per_step: float  # of one CPU core, or of the clock on a GPU


def read_ledger(path: Path) -> list[Row]:
    """Return the rows of a ledger; none if there is no file."""
    if not path.exists():
        return []
    kinds = {f.name: str(f.type) for f in fields(Row)}

    def value(name: str, text: str) -> str | int | float | None:
        if text == "":
            return "" if kinds[name] == "str" else None
        return int(text) if kinds[name] == "int" else text if kinds[name] == "str" else float(text)

    with path.open(newline="") as file:
        return [Row(**{k: value(k, v) for k, v in line.items()}) for line in csv.DictReader(file)]  # type: ignore[arg-type]


def append_row(path: Path, row: Row) -> None:
    """Append one row; the header first where the file is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        values = {k: "" if v is None else f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
        writer.writerow(values)


def data_of(name: str, out: Path) -> Path:
    """Return the dataset of a set; one with a number is laid out with that many of its training images."""
    source, _, count = SETS[name], *name.partition("-")[1:]
    if not count:
        return DATA / source
    folder = out / "data" / name / source
    if not folder.exists():
        part = out / "data" / f"{name}.part"
        shutil.copytree(DATA / source, part)  # links out of a dataset are refused
        lists = part / "ImageSets" / "Main" / "train.txt"
        lists.write_text("\n".join(sorted(random.Random(0).sample(lists.read_text().split(), int(count)))) + "\n")
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.rename(folder)
    return folder


def run(job: Job, out: Path, commit: str, device: str) -> Row:
    """Train one run, unless its model is there already, and evaluate it."""
    from rtdetr_cli.config.run import resolve_run
    from rtdetr_cli.train.events import StepDone
    from rtdetr_cli.workflows.finetune import finetune
    from rtdetr_cli.workflows.prepare import load_data

    data = data_of(job.set, out)
    name = f"{commit}-{job.arm}-{job.preset}-{job.imgsz}-{job.set}-{job.steps}-{job.seed}"
    flags = {"preset": job.preset, "data": str(data), "weights": "none", "imgsz": job.imgsz, "seed": job.seed}
    flags |= {"device": device, "workers": 0, "cache": "ram", "out": str(out / "runs"), "name": name}
    words = [*job.settings.split(), "plots=false"]
    probe = resolve_run({**flags, "epochs": 1}, sets=words)
    images = len(load_data(probe).train or ())
    epochs = max(1, round(job.steps / -(-images // probe.preset.optim.batch)))
    config = resolve_run({**flags, "epochs": epochs}, sets=[*words, f"eval_every={epochs}"])
    folder, clock = out / "runs" / name, time.process_time if device == "cpu" else time.monotonic
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        earlier = job.arm.partition("@")[2]
        if earlier:
            words += [f"eval_every={epochs}"]
            used = take_turn(partial(train_at, earlier, {**flags, "epochs": epochs}, words))
            seconds = (used.cpu if device == "cpu" else used.wall) / job.steps  # with its start and evaluation
        else:
            times = [clock() for event in finetune(config) if isinstance(event, StepDone)]
            seconds = (times[-1] - times[0]) / max(1, len(times) - 1)
        (folder / "last.ckpt").unlink(missing_ok=True)
        (folder / "done").write_text(str(seconds))
    return measure(job, folder, commit, device)


def train_at(commit: str, flags: dict[str, object], words: Sequence[str]) -> None:
    """Train with the command of an earlier commit."""
    options = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    options += [text for word in words for text in ("--set", word)]
    with checkout(commit) as tree:
        harness.run(["-m", "rtdetr_cli", "train", *options], tree=tree, threads=1)


def measure(job: Job, folder: Path, commit: str, device: str) -> Row:
    """Evaluate the model of a finished run."""
    from rtdetr_cli.evaluate.error_analysis import analyze_errors
    from rtdetr_cli.evaluate.run import evaluate
    from rtdetr_cli.evaluate.source import choose_split
    from rtdetr_cli.infer.torch_backend import TorchBackend
    from rtdetr_cli.weights.load import load_model

    model, header = load_model(folder / "best.safetensors")
    split = choose_split(None, split=job.split, model=folder / "best.safetensors", header=header).dataset
    raw, found = (
        evaluate(TorchBackend(model, header.with_dedupe(gamma), device=device), split) for gamma in (0.0, GAMMA)
    )
    errors, count = analyze_errors(found), len(found.dataset)
    return Row(
        **asdict(job),
        commit=commit,
        AP_raw=raw.metrics["AP"] or 0.0,
        AP=found.metrics["AP"] or 0.0,
        AP50=found.metrics["AP50"] or 0.0,
        APs=found.metrics["APs"],
        duplicates=errors.counts["duplicate"] / count,
        false_positives=sum(n for kind, n in errors.counts.items() if kind != "missed") / count,
        seconds_per_step=float((folder / "done").read_text()),
    )


def summarize(rows: Sequence[Row], against: str) -> Iterator[str]:
    """Yield a line for each arm, set and number of steps: the mean AP, and the difference from `against` by seed."""
    from scipy.stats import t

    groups: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row.preset, str(row.imgsz), row.set, str(row.steps), row.split, row.arm), {})[row.seed] = row
    columns = {"AP_raw": "raw", "AP": "AP", "AP50": "AP50", "duplicates": "dup", "false_positives": "FP"}
    columns |= {"seconds_per_step": "s/step"}
    heading = " ".join(f"{title:>6}" for title in columns.values())
    yield f"{'preset, size, set, steps, split':<32} {'arm':<16} {heading}  difference"
    for key, by_seed in sorted(groups.items()):
        *where, arm = key
        means = [statistics.mean(getattr(row, name) for row in by_seed.values()) for name in columns]
        line = f"{' '.join(where):<32} {arm:<16} {' '.join(f'{mean:6.3f}' for mean in means)}  "
        base = groups.get((*where, against), {})
        differences = [by_seed[seed].AP - base[seed].AP for seed in sorted(by_seed.keys() & base.keys())]
        if arm == against or not differences:
            yield f"{line}{len(by_seed)} seeds"
            continue
        average, count = statistics.mean(differences), len(differences)
        line += f"{average:+.3f}"
        if count > 1:
            half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / count**0.5
            line += f" [{average - half:+.3f}, {average + half:+.3f}]"
        yield f"{line}  by seed {' '.join(f'{d:+.3f}' for d in differences)}"


def numbers(text: str) -> list[int]:
    """Read `0-2,7` as 0, 1, 2, 7."""
    ranges = [part.partition("-") for part in text.split(",")]
    return [n for low, _, high in ranges for n in range(int(low), int(high or low) + 1)]


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", action="append", default=[], help=f"{', '.join(ARMS)}, or name:key=value,key=value")
    parser.add_argument("--against", default="default", help="the arm that the others are compared with")
    parser.add_argument("--set", default="bccd", help=f"of {', '.join(SETS)}")
    parser.add_argument("--seeds", default="0-2")
    parser.add_argument("--steps", default="260")
    parser.add_argument("--split", default="val")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--imgsz", type=int, default=192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, with one thread each")
    parser.add_argument("--commits", default="", help="count the rows of these commits too: a,b")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    parser.add_argument("--out", type=Path, default=Path("runs") / "learn", help="folder of the runs")
    return parser.parse_args()


def main() -> None:
    """Run what the ledger lacks, seed by seed, and print the paired differences."""
    args = parse()
    arms = dict(ARMS)
    for word in [args.against, *args.arm]:
        name, colon, settings = word.partition(":")
        arms |= {name: tuple(settings.split(","))} if colon else {name: ()} if "@" in name else {}
    names = list(dict.fromkeys(word.partition(":")[0] for word in [args.against, *args.arm]))
    if args.split == "val" and any("@" in name for name in names) and "cards" in args.set:
        raise SystemExit("cards has no val split of its own: another commit can only be compared on --split test")
    command = ["git", "log", "-1", "--format=%h", "--", "rtdetr_cli", "presets"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    wanted = [
        Job(name, " ".join(arms[name]), args.preset, args.imgsz, data, seed, steps, args.split)
        for steps in numbers(args.steps)
        for seed in numbers(args.seeds)
        for data in args.set.split(",")
        for name in names
    ]
    known = finished(read_ledger(args.ledger), {commit, *args.commits.split(",")})
    missing = [] if args.summary else [job for job in wanted if job not in known]
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    out = args.out.resolve()
    for data in {job.set for job in missing}:
        data_of(data, out)  # before several processes need it
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(run, job, out, commit, args.device) for job in missing]):
            row = done.result()
            append_row(args.ledger, row)
            known[job_of(row)] = row
            print(f"{row.arm} {row.set} seed {row.seed} {row.steps} steps: AP {row.AP:.3f}", flush=True)
    print(*summarize([known[job] for job in wanted if job in known], names[0]), sep="\n")


def finished(rows: Sequence[Row], commits: set[str]) -> dict[Job, Row]:
    """Return the rows of these commits by run; the last one of equal runs counts."""
    return {job_of(row): row for row in rows if row.commit in commits}


def job_of(row: Row) -> Job:
    """Return the run that a row is of."""
    return Job(**{f.name: getattr(row, f.name) for f in fields(Job)})


if __name__ == "__main__":
    main()
