"""Detect objects in every image of a folder, and save the crops of one class.

    python examples/predict_folder.py best.onnx images/ --class-name person --out crops/

Works with any model file; an ONNX file needs no torch. Images that cannot be read are reported and skipped, and the
exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from rtdetr_cli import load
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.images.decode import ImageError, read_image


def main() -> int:
    """Predict and write the crops; return the number of images that could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model file, or a run folder")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--class-name", required=True)
    parser.add_argument("--out", type=Path, default=Path("crops"))
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is not a folder")
    arguments.out.mkdir(parents=True, exist_ok=True)

    unreadable = 0
    detector = load(arguments.model)
    for path in sorted(p for p in arguments.folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")):
        try:
            image = read_image(path)  # upright RGB, as in training
        except ImageError as error:
            print(error, file=sys.stderr)
            unreadable += 1
            continue
        detections = detector.predict(image, classes=[arguments.class_name])
        for number, (x1, y1, x2, y2) in enumerate(detections.boxes_xyxy_px.round().astype(int)):
            if x2 > x1 and y2 > y1:
                Image.fromarray(image[y1:y2, x1:x2]).save(arguments.out / f"{path.stem}_{number}.png")
        print(f"{path.name}: {len(detections)} {arguments.class_name}")
    return unreadable


if __name__ == "__main__":
    try:
        sys.exit(1 if main() else 0)
    except RtdetrError as error:  # no such model, or no such class
        sys.exit(f"{error.message}\n{error.hint}".rstrip())
