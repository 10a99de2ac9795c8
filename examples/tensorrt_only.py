"""Run an exported engine with TensorRT alone; numpy holds the pictures, Pillow reads them, libcudart copies them.

    python examples/tensorrt_only.py runs/r18-mine-01/export/best.engine picture.jpg

Class names, thresholds and the input size come from the header beside the engine: `best.engine.json`.
"""

import ctypes
import json
import sys

import numpy as np
import tensorrt
from PIL import Image, ImageOps

TO_DEVICE, TO_HOST = 1, 2


def detect(engine, header, path):
    """Return (name, category id, score, x1, y1, x2, y2) of each object, best first, in pixels of the picture."""
    cuda = ctypes.CDLL("libcudart.so")
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    width, height = picture.size
    size = (header["imgsz"][1], header["imgsz"][0])
    stretched = np.asarray(picture.resize(size, Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    copies = max(1, engine.get_tensor_shape("images")[0])  # -1 where the batch is open
    arrays = {
        "images": np.repeat(stretched[None].astype(np.float32) / 255, copies, 0),
        "orig_target_sizes": np.array([[width, height]] * copies, np.int64),
    }
    context = engine.create_execution_context()
    for name, array in arrays.items():
        context.set_input_shape(name, array.shape)
    for name, kind in (("labels", np.int64), ("boxes", np.float32), ("scores", np.float32)):
        arrays[name] = np.empty(tuple(context.get_tensor_shape(name)), kind)
    pointers = {name: ctypes.c_void_p() for name in arrays}
    for name, array in arrays.items():
        if cuda.cudaMalloc(ctypes.byref(pointers[name]), ctypes.c_size_t(array.nbytes)):
            raise MemoryError(f"no device memory for {name}")
        cuda.cudaMemcpy(pointers[name], ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), TO_DEVICE)
        context.set_tensor_address(name, pointers[name].value)
    if not context.execute_async_v3(0):
        raise RuntimeError("TensorRT could not run the engine")
    for name, array in arrays.items():
        cuda.cudaMemcpy(ctypes.c_void_p(array.ctypes.data), pointers[name], ctypes.c_size_t(array.nbytes), TO_HOST)
        cuda.cudaFree(pointers[name])
    stored = header["thresholds"]
    floors = np.array(stored["per_class"] if stored else [0.5] * len(header["names"]), np.float32)
    labels, boxes, scores = arrays["labels"][0], arrays["boxes"][0].clip(0, [width, height] * 2), arrays["scores"][0]
    for row in np.flatnonzero(scores >= floors[labels])[:100]:
        label = labels[row]
        yield (header["names"][label], header["category_ids"][label], float(scores[row]), *map(float, boxes[row]))


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as plan, open(sys.argv[1] + ".json", encoding="utf-8") as beside:
        loaded = tensorrt.Runtime(tensorrt.Logger()).deserialize_cuda_engine(plan.read())
        for name, category, score, *box in detect(loaded, json.load(beside), sys.argv[2]):
            print(f"{name} ({category}) {score:.3f} [{', '.join(f'{v:.1f}' for v in box)}]")
