"""Start-up: one image through `rtdetr predict` with an r18 ONNX file at 640, beside `python -c "import torch"`.

    python tests/bench/bench_predict_startup.py [--weights r18.onnx] [--rounds 5]

Both are run as fresh processes, taking turns, so that other work on the machine touches both alike. The network's own
time is what the prediction itself reports for its one run (cold: nothing is warmed up). The claim: `predict` takes no
longer than importing torch and that one run. Without --weights an r18 with values drawn from a seed is exported first;
they do not matter for the time.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="an r18 ONNX file at 640")
    parser.add_argument("--image", type=Path, help="any image; a generated 640x480 one by default")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = arguments.weights or export_r18(Path(folder))
        image = arguments.image or make_image(Path(folder))
        commands = {
            "rtdetr predict": [
                sys.executable,
                "-m",
                "rtdetr_cli",
                "predict",
                image,
                "--weights",
                weights,
                "--out",
                Path(folder) / "out",
            ],
            "import torch": [sys.executable, "-c", "import torch"],
            "python": [sys.executable, "-c", "pass"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        network: list[float] = []
        for number in range(arguments.rounds + 1):
            for name, command in commands.items():
                start = time.perf_counter()
                ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
                took = time.perf_counter() - start
                if number == 0:
                    continue  # fills the disk cache
                seconds[name].append(took)
                if name == "rtdetr predict":
                    found = re.search(r"(\d+) ms$", ran.stdout.strip())
                    assert found, ran.stdout
                    network.append(int(found[1]) / 1000)
    for name, times in (*seconds.items(), ("network alone", network)):
        print(
            f"{name:15} mean {statistics.mean(times):.3f} s  min {min(times):.3f}  max {max(times):.3f}  n {len(times)}"
        )
    predict, torch = statistics.mean(seconds["rtdetr predict"]), statistics.mean(seconds["import torch"])
    own = statistics.mean(network)
    print(f"predict / (import torch + network) = {predict:.3f} / {torch + own:.3f} = {predict / (torch + own):.2f}")
    print(f"predict without its network / import torch = {(predict - own) / torch:.2f}")


def export_r18(folder: Path) -> Path:
    import torch

    from rtdetr_cli.config.presets import load_preset
    from rtdetr_cli.export.options import ExportOptions
    from rtdetr_cli.export.run import export_model
    from rtdetr_cli.model.build import build_detector
    from rtdetr_cli.weights.header import ModelHeader

    torch.manual_seed(0)
    preset = load_preset("r18")
    header = ModelHeader(
        names=tuple(f"thing {i}" for i in range(80)),
        category_ids=tuple(range(80)),
        imgsz=(640, 640),
        architecture=preset.model.model_dump(mode="json"),
    )
    model = build_detector(preset.model, num_classes=80).eval()
    return export_model(model, header, folder, ExportOptions(), stem="r18")[0].path


def make_image(folder: Path) -> Path:
    levels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    path = folder / "image.jpg"
    Image.fromarray(levels).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=92)
    return path


if __name__ == "__main__":
    main()
