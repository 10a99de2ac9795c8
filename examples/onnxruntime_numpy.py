"""Run an exported detector with only numpy and onnxruntime; Pillow reads the image.

    python examples/onnxruntime_numpy.py runs/tiny-demo-01/export/best.onnx image.jpg

Class names, thresholds and the input size are in the file, or in a labels.json beside it, which may be edited. The
output equals that of `rtdetr predict`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def load(path):
    """Return a session, the class names and other settings, and the threshold of each class."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    if "labels" not in {output.name for output in session.get_outputs()}:
        sys.exit(f"{path} is a raw export, without post-processing: export it without --raw")
    text = session.get_modelmeta().custom_metadata_map.get("rtdetr") or sys.exit(f"{path} has no header")
    beside = Path(path).with_name("labels.json")
    header = json.loads(beside.read_text("utf-8") if beside.is_file() else text)
    thresholds = (header["thresholds"] or {}).get("per_class") or [0.5] * len(header["names"])
    return session, header, np.array(thresholds, np.float32)


def detect(session, header, thresholds, path):
    """Return (name, category id, score, x1, y1, x2, y2) of each object, best first, in pixels of the image."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I;16"):  # of 16 bits, the high byte
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    width, height = image.size
    if session.get_inputs()[0].type == "tensor(uint8)":  # exported with --preprocess-in-graph
        images = np.asarray(image)[None]
    else:
        size = (header["imgsz"][1], header["imgsz"][0])
        stretched = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        images = np.ascontiguousarray(stretched.transpose(2, 0, 1)[None], dtype=np.float32) / 255
    batch = session.get_inputs()[0].shape[0]
    copies = batch if isinstance(batch, int) else 1  # a fixed batch must be filled
    feeds = {"images": np.repeat(images, copies, 0), "orig_target_sizes": np.array([[width, height]] * copies)}
    labels, boxes, scores = (out[0] for out in session.run(["labels", "boxes", "scores"], feeds))
    boxes = boxes.clip(0, [width, height, width, height])
    keep = (scores >= thresholds[labels]) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    for label, score, box in list(zip(labels[keep], scores[keep], boxes[keep], strict=True))[:100]:
        yield (header["names"][label], header["category_ids"][label], float(score), *map(float, box))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    beside = Path(__file__).resolve().with_name("model.onnx")  # in a folder of --bundle
    if len(arguments) == 1 and beside.is_file():
        arguments = [str(beside), *arguments]
    if len(arguments) != 2:
        sys.exit(f"usage: python {sys.argv[0]} MODEL.onnx IMAGE (or only IMAGE, with model.onnx beside the program)")
    for path in arguments:
        if not Path(path).is_file():
            sys.exit(f"{path} is not a file")
    model = load(arguments[0])
    try:
        found = list(detect(*model, arguments[1]))
    except OSError as error:
        sys.exit(f"{arguments[1]} cannot be read: {error}")
    for name, category, score, *box in found:
        print(f"{name} ({category}) {score:.3f} [{', '.join(f'{v:.1f}' for v in box)}]")
