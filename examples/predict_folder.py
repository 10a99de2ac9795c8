"""Find objects in every picture of a folder, and keep the crops of one class.

    python examples/predict_folder.py best.onnx pictures/ --class-name person --out crops/

Works with any model file; with an ONNX file torch is never loaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from rtdetr_cli import load
from rtdetr_cli.data.pictures import PictureError, read_picture


def main() -> None:
    """Read the arguments, predict, write the crops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model file, or a run folder")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--class-name", required=True)
    parser.add_argument("--out", type=Path, default=Path("crops"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    detector = load(arguments.model)
    for path in sorted(p for p in arguments.folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")):
        try:
            picture = read_picture(path)  # upright RGB, as in training
        except PictureError as error:
            print(error)
            continue
        found = detector.predict(picture, classes=[arguments.class_name])
        for number, (x1, y1, x2, y2) in enumerate(found.boxes_xyxy_px.round().astype(int)):
            if x2 > x1 and y2 > y1:
                Image.fromarray(picture[y1:y2, x1:x2]).save(arguments.out / f"{path.stem}_{number}.png")
        print(f"{path.name}: {len(found)} {arguments.class_name}")


if __name__ == "__main__":
    main()
