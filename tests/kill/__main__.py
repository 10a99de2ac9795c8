"""Kill commands at random moments, repeat or resume them, and compare with a command that nobody killed.

    python -m tests.kill --trials 60 --folder /tmp/kills

Each command runs once to its end as the reference. A trial starts it again, sends SIGKILL at a random moment of the
reference's duration, looks whether anything half-written has a final name, then resumes or repeats the command and
compares every file that must be the same. With `--folder`, finished trials are kept: the same line continues them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.small import FLAGS

os.environ |= {
    "NO_COLOR": "1",
    "MPLBACKEND": "Agg",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

DOWNLOAD = "rtdetrv2_r18vd_120e_coco_rerun_48.1.pth"
TRAIN = [*FLAGS, "--batch", "8", "--weights", "none", "--set", "checkpoint_steps=2"]


@dataclass(frozen=True)
class Command:
    """A command to kill.

    Attributes:
        start: its words.
        again: the words that resume or repeat it; called after the kill.
        same: files, as patterns, that must have the reference's bytes at the end.
        whole: files, as patterns, that must be absent or complete at any moment.
        turns: how many trials of a round it gets; fewer for what takes long.
    """

    start: list[str]
    again: Callable[[Path], list[str]]
    same: tuple[str, ...]
    whole: tuple[str, ...] = ()
    turns: int = 3


def commands(shared: Path) -> dict[str, Command]:
    """Return the commands; each runs in a folder of its own, beside which `shared` holds what they read."""
    data, faulty = str(shared / "data"), str(shared / "faulty")
    train = ["train", "--data", data, "--epochs", "3", "--name", "r", *TRAIN]
    flags = "--epochs 1 --name d --max-drop 1 --out runs"
    discrete = ["finetune-discrete", str(shared / "r"), *flags.split()]

    def resume(command: str, name: str, start: list[str], folder: Path) -> list[str]:
        if (folder / f"runs/{name}/manifest.json").exists():
            return [command, "--resume", f"runs/{name}"]
        shutil.rmtree(folder / f"runs/{name}", ignore_errors=True)
        return start

    def repeat(start: list[str], out: str) -> Callable[[Path], list[str]]:
        def again(folder: Path) -> list[str]:
            shutil.rmtree(folder / out, ignore_errors=True)
            return start

        return again

    fix = ["validate", faulty, "--fix", "fixed"]
    convert = ["validate", faulty, "--convert", "yolo", "--to", "converted"]
    export = ["export", str(shared / "r"), "--onnx", "--no-gate", "--out", "exported"]
    fetch = ["weights", "fetch", DOWNLOAD]
    return {
        "train": Command(train, functools.partial(resume, "train", "r", train), ("runs/r/best.safetensors",
        "runs/r/metrics.csv"), ("runs/r/best.safetensors",), 2),
        "finetune-discrete": Command(discrete, functools.partial(resume, "finetune-discrete", "d", discrete),
        ("runs/d/best.safetensors", "runs/d/metrics.csv"), turns=1),
        "export": Command(export, lambda folder: export, ("exported/*.onnx",), ("exported/*.onnx",), 2),
        "validate --fix": Command(fix, repeat(fix, "fixed"), ("fixed/**/*",), ("fixed/**/*",)),
        "validate --convert": Command(convert, repeat(convert, "converted"), ("converted/**/*",), ("converted/**/*",)),
        "weights fetch": Command(fetch, lambda folder: fetch, ("home/weights/*",), ("home/weights/*",)),
    }  # fmt: skip


def start(words: list[str], folder: Path) -> int:
    """Run `rtdetr WORDS` in a fork of this process, and return its id."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):  # it may have started its group itself, or have ended
            os.setpgid(child, child)
        return child
    code = 99
    try:
        os.setpgid(0, 0)
        log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        os.environ["RTDETR_CLI_HOME"] = str(folder / "home")
        from rtdetr_cli.cli.app import run

        code = run(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def files(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Return the files that match, without hidden ones: those of a write that is under way."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    relative = {path.relative_to(folder): path for path in sorted(found)}
    return {str(r): p.read_bytes() for r, p in relative.items() if not any(n.startswith(".") for n in r.parts)}


def trial(command: Command, reference: dict[str, bytes], whole: dict[str, bytes], folder: Path, delay: float) -> str:
    """Kill, look, repeat and compare; return what is wrong, or an empty text."""
    child = start(command.start, folder)
    time.sleep(delay)
    os.killpg(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        return f"failed before it was killed: {(folder / 'log.txt').read_text()[-300:]}"
    for name, data in files(folder, command.whole).items():
        if ".unverified." in name:  # an export has this name until it is complete and verified
            continue
        # Any epoch's model is complete; everything else has one content only.
        if name.endswith(".safetensors"):
            from rtdetr_cli.weights.load import load_model

            load_model(folder / name)
        elif whole.get(name) != data:
            return f"{name} was half-written"
    if code := os.waitstatus_to_exitcode(os.waitpid(start(command.again(folder), folder), 0)[1]):
        return f"exit code {code} afterwards: {(folder / 'log.txt').read_text()[-300:]}"
    result = files(folder, command.same)
    different = sorted(name for name in {*reference, *result} if reference.get(name) != result.get(name))
    return f"different: {', '.join(different[:3])}" if different else ""


def prepare(shared: Path) -> None:
    """Write what the commands read: two datasets, a trained run, and a server with the published weights."""
    from rtdetr_cli.datasets.generate import generate_dataset
    from rtdetr_cli.weights import hub
    from rtdetr_cli.weights.catalogue import find_published

    if not (shared / "r").exists():
        generate_dataset(shared / "data", train=24, val=6, imgsz=64)
        shutil.copytree(shared / "data", shared / "faulty")
        document = json.loads(next((shared / "faulty").rglob("*train*.json")).read_text())
        document["annotations"][0]["bbox"][2] = 9999
        next((shared / "faulty").rglob("*train*.json")).write_text(json.dumps(document))
        words = ["train", "--data", str(shared / "data"), "--epochs", "2", "--name", "r", "--out", str(shared), *TRAIN]
        if os.waitpid(start(words, shared), 0)[1]:
            raise SystemExit((shared / "log.txt").read_text())
        (shared / "mirror").mkdir()
        (shared / "mirror" / DOWNLOAD).write_bytes(Random(0).randbytes(40 << 20))
    # The file stands for the published one, whose bytes are not on this machine.
    entry = find_published(DOWNLOAD)
    object.__setattr__(entry, "sha256", hub.file_sha256(shared / "mirror" / DOWNLOAD))
    object.__setattr__(entry, "bytes", (shared / "mirror" / DOWNLOAD).stat().st_size)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shared / "mirror"))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a killed client resets the connection
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["RTDETR_CLI_MIRROR"] = f"http://127.0.0.1:{server.server_port}"


def main() -> int:
    """Run the trials in turn, print a table, and return 1 if one failed."""
    import rtdetr_cli.workflows.finetune_discrete  # noqa: F401

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12, help="number of kills, shared by the commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep results here, and continue from those that are there")
    parser.add_argument("--only", action="append", metavar="COMMAND")
    options = parser.parse_args()
    root = (options.folder or Path(tempfile.mkdtemp(prefix="rtdetr-kill-"))).resolve()
    shared = root / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    prepare(shared)
    ledger = root / "trials.jsonl"
    done = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    chosen = {name: command for name, command in commands(shared).items() if not options.only or name in options.only}
    turns = [name for turn in range(3) for name, command in chosen.items() if turn < command.turns]
    references: dict[str, tuple[float, Path]] = {}
    for number in range(options.trials):
        name = turns[number % len(turns)]
        if any(entry["command"] == name and entry["number"] == number for entry in done):
            continue
        command = chosen[name]
        if name not in references:
            folder = root / "reference" / name
            shutil.rmtree(folder, ignore_errors=True)
            began = time.monotonic()
            if os.waitpid(start(command.start, folder), 0)[1]:
                raise SystemExit((folder / "log.txt").read_text())
            references[name] = time.monotonic() - began, folder
        seconds, folder = references[name]
        delay = Random(f"{options.seed}/{number}").uniform(0, seconds)
        work = root / "trial"
        shutil.rmtree(work, ignore_errors=True)
        problem = trial(command, files(folder, command.same), files(folder, command.whole), work, delay)
        done.append({"command": name, "number": number, "after": round(delay, 2), "problem": problem})
        with ledger.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(f"{number}: {name} killed after {delay:.1f} of {seconds:.1f} s: {problem or 'the same'}", flush=True)
    for name in chosen:
        mine = [entry for entry in done if entry["command"] == name]
        print(f"{name}: {len(mine)} kills, {sum(bool(e['problem']) for e in mine)} failed")
    failed = any(entry["problem"] for entry in done)
    if not failed and not options.folder:
        shutil.rmtree(root)
    return failed


if __name__ == "__main__":
    sys.exit(main())
