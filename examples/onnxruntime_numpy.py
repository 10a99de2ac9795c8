"""Run an exported detector with only numpy and onnxruntime; Pillow reads the image.

    python examples/onnxruntime_numpy.py runs/tiny-demo-01/export/best.onnx image.jpg

Class names, thresholds and the input size are in the file. The output equals that of `rtdetr predict`.
"""

import json
import os
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def load(path):
    """Return a session, the header stored in the file, and the threshold of each class."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    if "labels" not in {output.name for output in session.get_outputs()}:
        sys.exit(f"{path} is a raw export, without post-processing: export it without --raw")
    header = json.loads(session.get_modelmeta().custom_metadata_map.get("rtdetr") or sys.exit(f"{path} has no header"))
    stored = header["thresholds"]
    thresholds = stored["per_class"] if stored else [0.5] * len(header["names"])
    return session, header, np.array(thresholds, np.float32)


def detect(session, header, thresholds, path):
    """Return (name, category id, score, x1, y1, x2, y2) of each object, best first, in pixels of the image."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
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
    keep = scores >= thresholds[labels]
    boxes = boxes[keep].clip(0, [width, height, width, height])
    for label, score, box in list(zip(labels[keep], scores[keep], boxes, strict=True))[:100]:
        yield (header["names"][label], header["category_ids"][label], float(score), *map(float, box))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/onnxruntime_numpy.py MODEL.onnx IMAGE")
    for path in sys.argv[1:]:
        if not os.path.isfile(path):
            sys.exit(f"{path} is not a file")
    model = load(sys.argv[1])
    for name, category, score, *box in detect(*model, sys.argv[2]):
        print(f"{name} ({category}) {score:.3f} [{', '.join(f'{v:.1f}' for v in box)}]")
