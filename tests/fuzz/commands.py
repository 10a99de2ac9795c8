"""Parts that damage run folders, arguments and the sources of `predict`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.files import MODEL, texts, write_coco, write_image
from tests.fuzz.forked import Case
from tests.fuzz.spoil import ODD_NUMBERS, dump, odd_name, odd_value, spoil_bytes, spoil_document


class Runs:
    """Run folders with damaged files: `train --resume`, `finetune-discrete`, `predict`, `eval`, `export`, `info`."""

    def prepare(self, base: Path) -> None:
        self.base = base
        write_coco(base / "coco")
        flags = """--preset tiny --weights none --imgsz 64 --epochs 1 --workers 0 --device cpu --effective-batch 4
            --set plots=false --name r"""
        sizes = ("width=8", "hidden_dim=16", "decoder_dim=16", "queries=10", "heads=2", "decoder_layers=1",
                 "eval_layers=1", "denoising=4")  # fmt: skip
        words = ["train", "--data", str(base / "coco"), "--out", str(base / "runs"), *flags.split()]
        words += [word for size in sizes for word in ("--set", f"model.{size}")]
        subprocess.run([sys.executable, "-m", "rtdetr_cli", *words], check=True, capture_output=True, cwd=base)

    def case(self, random: Random, work: Path) -> Case:
        run = work / "runs/r"
        shutil.copytree(self.base / "runs/r", run)
        manifest = json.loads((run / "manifest.json").read_text())
        if random.random() < 0.7:
            manifest["finished"] = None
        (run / "manifest.json").write_text(json.dumps(manifest))
        for path in random.sample(sorted(p for p in run.iterdir() if p.is_file()), random.randint(1, 2)):
            self.spoil(random, path)
        json_flag = random.choice(([], ["--json"]))
        image = self.base / "coco/images/train_0.jpg"
        # A dry run would export the model, which takes longer than to train it for an epoch.
        flags = "--epochs 1 --out new --name again --workers 0 --device cpu --set plots=false"
        return Case(random.choice([
            ["train", "--resume", run, *json_flag], ["train", "--resume", run], ["train", "--resume", run,
            "--epochs", "2"], ["info", run, *json_flag],
            ["predict", image, *json_flag], ["predict", image, "-w", run], ["eval", run, "--data",
            self.base / "coco", *json_flag], ["info", run / "last.ckpt"],
            ["finetune-discrete", "--resume", run], ["finetune-discrete", run, "--data", self.base / "gone"],
            ["export", run, "--verify", "gone"],
            ["train", "--config", run / "config.toml", *flags.split()],
            ["train", "--weights", run, "--data", self.base / "coco", *flags.split()],
        ]) | texts)  # fmt: skip

    def spoil(self, random: Random, path: Path) -> None:
        data = path.read_bytes()
        kind = random.randint(0, 6)
        if kind == 0:
            path.write_bytes(
                random.choice((b"", b"\0" * 50, b"[]", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b"3", b'"x"'))
            )
        elif kind == 1:
            path.unlink()
        elif kind == 2 and path.suffix == ".json":
            path.write_bytes(dump(spoil_document(random, json.loads(data))))
        elif kind == 3 and path.suffix == ".ckpt":
            self.checkpoint(random, path)
        elif kind == 4 and random.random() < 0.2:
            path.unlink()
            random.choice(
                (
                    path.mkdir,
                    lambda: os.mkfifo(path),
                    lambda: path.symlink_to("/dev/zero"),
                    lambda: path.symlink_to(path),
                )
            )()
        elif path.suffix in (".toml", ".csv", ".json") and random.random() < 0.6:
            lines = data.split(b"\n")
            at = random.randrange(len(lines))
            lines[at] = random.choice(
                [
                    lines[at].partition(b"=")[0] + b"= " + dump(random.choice(ODD_NUMBERS)),
                    lines[at] * 2,
                    b"",
                    b"1,2,x",
                    b"\xff",
                ]
            )
            path.write_bytes(b"\n".join(lines))
        else:
            path.write_bytes(spoil_bytes(random, data))

    def checkpoint(self, random: Random, path: Path) -> None:
        """Write a sealed checkpoint whose content is not that of a run."""
        from rtdetr_cli.train.checkpoint import read_checkpoint, save_checkpoint

        state: Any = read_checkpoint(path)
        part = random.choice(list(state))
        if random.random() < 0.3:
            del state[part]
        elif isinstance(state[part], dict):
            inner = random.choice(list(state[part]))
            if random.random() < 0.4:
                del state[part][inner]
            else:
                state[part][inner] = odd_value(random, 1)
        else:
            state[part] = odd_value(random, 1)
        try:
            save_checkpoint(path.parent, state)
        except RecursionError:
            path.write_bytes(b"")


class Args:
    """Odd values for every flag and argument of every command."""

    def prepare(self, base: Path) -> None:
        import typer

        from rtdetr_cli.cli.app import build

        self.base = base
        write_coco(base / "coco")
        shutil.copy(MODEL, base / "m.safetensors")
        (base / "deep.toml").write_text("x = " + "[" * 5000)
        (base / "binary.toml").write_bytes(b"\xff\0" * 50)
        group: Any = typer.main.get_command(build())
        commands = {k: c for k, c in group.commands.items() if k not in ("demo", "weights", "doctor", "presets")}
        for name in ("weights", "presets"):
            commands |= {f"{name} {sub}": command for sub, command in group.commands[name].commands.items()}
        # To compile takes longer than a case may.
        flags = {k: [p for p in c.params if p.opts[0].startswith("-")] for k, c in commands.items()}
        self.flags = {k: [p for p in params if "--compile" not in p.opts] for k, params in flags.items()}

    VALUES = ("", "-1", "0", "1", "2", "1e300", "inf", "nan", "9" * 5000, str(2**64), str(2**63), "10" * 15,
    "[" * 2000, "\udcff", "a\nb", "\x1b[2J", "/dev/zero",
              "/dev/null", "/", ".", "~", "gone", "a=b", "x" * 5000, "0.5", "auto", "none", "all", "cpu", "0,1",
              "cpu,cpu", "32", "64x96", "0x0", "33",
              "4096x4096", "١٢", "²", "--", "-", "f1", "precision=2", "precision=nan", "coco", "yolo", "bilinear",
              "tiny", "r18", "1,0", "0.8,0.2")  # fmt: skip
    SETS = ("seed=18446744073709551616", "cache_gb=inf", "cache_gb=1e300", "epochs=1000000000000000000000000000000",
    "x=" + "[" * 3000, "model.decoder_layers=1000000000",
            "model.depth_mult=1e9", "model.queries=1000000000", "model.hidden_dim=4000000000", "epochs=nan",
            "workers=100000", "imgsz=[]", "log=[1]", "lr=inf",
            "warmup=nan", "model.num_points=[99999,1,1]", "optim.clip_norm=inf", "model.freeze_at=99",
            "optim.batch=0", "model=3", "preset=tiny.toml",
            "checkpoint_minutes=inf", "effective_batch=1000000000", "batch=100000000", "name='\\u0000'",
            "out='\\u0000'", "a.b.c.d=1", "=", "data=''",
            "weights='\\u0000'", "aug='\\u0000'", "patience=1e99", "val_fraction=1e-300",
            "model.encoder_layers=1000000", "model.heads=3")  # fmt: skip

    def case(self, random: Random, work: Path) -> Case:
        name = random.choice(list(self.flags))
        shutil.copy(self.base / "m.safetensors", work / "m.safetensors")
        argv = name.split()
        image = str(self.base / "coco/images/train_0.jpg")
        places = {
            "train": ["--data", str(self.base / "coco"), "--preset", "tiny", "--weights", "none", "--device", "cpu",
            "--workers", "0", "--dry-run"],
            "finetune-discrete": ["m.safetensors", "--data", str(self.base / "gone")],
            "eval": ["m.safetensors", "--data", str(self.base / "coco")],
            "predict": [image, "--weights", "m.safetensors", "--out", "out"],
            "export": ["m.safetensors", "--no-gate", "--verify", "gone"],
            "verify": ["m.safetensors", "--against", "m.safetensors", "--data", str(self.base / "coco")],
            "benchmark": ["m.safetensors", "--runs", "1", "--warmup", "0", "--backends", "torch"],
            "compare": ["m.safetensors", "m.safetensors", "--data", str(self.base / "coco")],
            "validate": [str(self.base / "coco"), "--fast"],
            "info": ["m.safetensors"],
        }  # fmt: skip
        argv += places.get(name, [random.choice(self.VALUES) for _ in range(random.randint(0, 2))])
        for _ in range(random.randint(1, 3)):
            flag = random.choice(self.flags[name])
            values = self.SETS if "--set" in flag.opts else self.VALUES
            argv.append(random.choice([*flag.opts, *flag.secondary_opts]))
            if not flag.is_flag:
                files = (str(self.base / "deep.toml"), str(self.base / "binary.toml"), "m.safetensors")
                argv.append(random.choice(values if random.random() < 0.9 else files).replace("\0", ""))
        if random.random() < 0.1 and len(argv) > 1:
            argv[random.randrange(1, len(argv))] = random.choice(self.VALUES)
        return Case(argv, random.choice((b"", b"\xff\n\0\n", b"x" * 5000)))


class Predict:
    """Odd sources of `predict`: files that are not images, pipes, links, names, and rubbish on stdin."""

    def prepare(self, base: Path) -> None:
        import cv2

        self.base = base
        write_image(base / "good.jpg")
        write_image(base / "good.png")
        writer = cv2.VideoWriter(str(base / "good.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5, (64, 48))
        for i in range(4):
            writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
        writer.release()

    def case(self, random: Random, work: Path) -> Case:
        shots = work / "shots"
        shots.mkdir()
        for _ in range(random.randint(1, 3)):
            self.source(random, shots)
        if random.random() < 0.6:
            shutil.copy(self.base / "good.jpg", shots / "a.jpg")
        names = [str(p) for p in shots.iterdir()]
        words = random.choice(
            [[str(shots)], names, ["shots/*"], ["-"], [random.choice(names)], [os.path.relpath(n, work) for n in names]]
        )
        stdin = b"\n".join(os.fsencode(n) for n in names) if words == ["-"] else b""
        if words == ["-"] and random.random() < 0.5:
            stdin = spoil_bytes(random, stdin)
        flags = [
            f for f in ("--save-json", "--save-coco", "--save-txt", "--json", "--no-save") if random.random() < 0.4
        ]
        words = [f"./{w}" if w.startswith("-") and w != "-" else w for w in words]
        flags += ["--conf", "0.01", "--batch", "2", "--out", random.choice(("out", "shots", "."))]
        return Case(["predict", *words, "-w", str(MODEL), *flags], stdin)

    def source(self, random: Random, shots: Path) -> None:
        suffix = random.choice(
            (".jpg", ".png", ".mp4", ".mkv", ".tif", ".webp", ".bmp", ".gif", ".avi", ".heic", ".txt", "")
        )
        path = shots / (odd_name(random, suffix) if random.random() < 0.4 else f"x{random.randint(0, 9)}{suffix}")
        good = self.base / (
            "good.mp4" if suffix in (".mp4", ".mkv", ".avi") else random.choice(("good.jpg", "good.png"))
        )
        kind = random.randint(0, 9)
        if path.exists():
            return
        if kind <= 3:
            shutil.copy(good, path)
        elif kind <= 5:
            path.write_bytes(spoil_bytes(random, good.read_bytes()))
        elif kind == 6:
            texts_of_lists = (str(self.base / "good.mp4"), f"ffconcat version 1.0\nfile {self.base / 'good.mp4'}\n")
            texts_of_others = ("", "\0" * 99, "#EXTM3U\n/etc/passwd\n", "[" * 9999, "<svg/>")
            path.write_text(random.choice(texts_of_lists + texts_of_others))
        elif kind == 7:
            random.choice((path.mkdir, lambda: os.mkfifo(path)))()
        elif kind == 8:
            path.symlink_to(
                random.choice((str(good), "/dev/zero", "/dev/stdin", "gone", path.name, "..", "/proc/self/mem"))
            )
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(good, "x.jpg")
