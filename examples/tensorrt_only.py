"""Run an engine with TensorRT, or TensorRT for RTX; numpy holds the images, Pillow reads them, libcudart copies them.

    python examples/tensorrt_only.py runs/r18-mine-01/export/best.engine image.jpg

Class names, thresholds and the input size are in the file beside the engine: `best.engine.json`.
"""

import ctypes
import importlib
import json
import os
import sys

import numpy as np
from PIL import Image, ImageOps


def detect(engine, header, path):
    """Return (name, category id, score, x1, y1, x2, y2) of each object, best first, in pixels of the image."""
    if "labels" not in {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}:
        sys.exit("this is a raw export, without post-processing: export it without --raw")
    cuda, to_device, to_host = ctypes.CDLL("libcudart.so"), 1, 2
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    width, height = image.size
    stretched = np.asarray(image.resize(header["imgsz"][::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    copies = max(1, engine.get_tensor_shape("images")[0])  # -1 where the batch is dynamic
    images = np.repeat(stretched[None].astype(np.float32) / 255, copies, 0)
    arrays = {"images": images, "orig_target_sizes": np.array([[width, height]] * copies, np.int64)}
    context = engine.create_execution_context()
    for name, array in arrays.items():
        context.set_input_shape(name, array.shape)
    for name, kind in (("labels", np.int64), ("boxes", np.float32), ("scores", np.float32)):
        arrays[name] = np.empty(tuple(context.get_tensor_shape(name)), kind)
    pointers = {name: ctypes.c_void_p() for name in arrays}
    for name, array in arrays.items():
        if cuda.cudaMalloc(ctypes.byref(pointers[name]), ctypes.c_size_t(array.nbytes)):
            raise MemoryError(f"not enough device memory for {name}")
        cuda.cudaMemcpy(pointers[name], ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), to_device)
        context.set_tensor_address(name, pointers[name].value)
    context.execute_async_v3(0) or sys.exit("TensorRT could not run the engine")
    for name, array in arrays.items():
        cuda.cudaMemcpy(ctypes.c_void_p(array.ctypes.data), pointers[name], ctypes.c_size_t(array.nbytes), to_host)
        cuda.cudaFree(pointers[name])
    minimum = np.array((header["thresholds"] or {"per_class": [0.5] * len(header["names"])})["per_class"], np.float32)
    labels, boxes, scores = arrays["labels"][0], arrays["boxes"][0].clip(0, [width, height] * 2), arrays["scores"][0]
    for i in np.flatnonzero(scores >= minimum[labels])[:100]:
        yield (header["names"][labels[i]], header["category_ids"][labels[i]], float(scores[i]), *map(float, boxes[i]))


if __name__ == "__main__":
    if len(sys.argv) != 3 or not all(map(os.path.isfile, sys.argv[1:])):
        sys.exit("usage: python examples/tensorrt_only.py MODEL.engine IMAGE (with MODEL.engine.json beside it)")
    os.path.isfile(sys.argv[1] + ".json") or sys.exit(f"{sys.argv[1]}.json is missing: copy it next to the engine")
    with open(sys.argv[1], "rb") as plan, open(sys.argv[1] + ".json", encoding="utf-8") as beside:
        header = json.load(beside)
        tensorrt = importlib.import_module("tensorrt_rtx" if "targets" in header["extra"] else "tensorrt")
        loaded = tensorrt.Runtime(tensorrt.Logger()).deserialize_cuda_engine(plan.read())
        for name, category, score, *box in detect(loaded, header, sys.argv[2]):
            print(f"{name} ({category}) {score:.3f} [{', '.join(f'{v:.1f}' for v in box)}]")
