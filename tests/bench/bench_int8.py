"""Which operators INT8 leaves in float, and how many calibration images help.

    python tests/bench/bench_int8.py runs/tiny-bccd-01 [--images 20] [--openvino]

Each row quantizes the model in another way and compares it with float32 on the val images of its dataset: AP, matched
detections, the mean score difference and 1 - IoU of the boxes, the size, and the latency of the network in turns with
the float file, as a share of the float file's.

Measured on a `tiny` trained on blood cells at 192 px (87 val images), AP and 1 - IoU of the boxes:
AP .2430, ONNX Runtime: convolutions .2456 and .0421; but the first .2424 and .0336; with 7 bits .2433 and .0347; and
all products .2507 and .0559; and sums, pools .2391 and .0633. Calibrated on 1, 4, 8, 16, 32, 64 images: boxes .0299,
.0294, .0305, .0319, .0324, .0336, so more images only widen the ranges of images that are all alike.
AP .5077, OpenVINO: everything .5036 and .0442; everything but the first convolution .5098 and .0238.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.export import int8
from rtdetr_cli.export.artefacts import artefact_files
from rtdetr_cli.export.compare import LIMITS, compare_detections
from rtdetr_cli.export.formats import Draft, ExportContext, onnx_draft, openvino_draft, read_float_openvino
from rtdetr_cli.export.fp16 import Island
from rtdetr_cli.export.images import calibration_images, verification_images
from rtdetr_cli.export.int8 import Calibration
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.export.verify import Reference, average_precision, predict, result_of
from rtdetr_cli.infer.backend import Backend, open_backend
from rtdetr_cli.infer.timing import images_to_time, latencies
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.weights.load import load_model


def recipes(openvino: bool) -> Iterator[tuple[str, Sequence[Island], int]]:
    """Yield a name, the parts in float, and the number of calibration images."""
    convolution = "Convolution" if openvino else "Conv"
    product = "MatMul"
    first = int8.FIRST_CONVOLUTION
    others = Island("other operators", "", lambda path, op: op not in (convolution, product))
    products = Island("matrix products", "", lambda path, op: op == product)
    decoder = Island("decoder", "", lambda path, op: path.startswith("model.decoder"))
    attention = Island("attention", "", lambda path, op: path.startswith("model.encoder.encoder"))
    yield "the recipe of export", int8.OPENVINO_FLOATS if openvino else int8.ONNX_FLOATS, 32
    yield "everything", (), 32
    yield "everything but the first convolution", (first,), 32
    yield "convolutions", (others, products), 32
    yield "convolutions but the first", (first, others, products), 32
    yield "convolutions but the first, and sums, pools", (first, products, decoder, attention), 32
    yield "convolutions but the first, and products of the encoder", (first, others, decoder), 32
    yield "convolutions but the first, and all products", (first, others), 32
    for count in (1, 4, 16, 64):
        yield f"the recipe, calibrated on {count}", int8.OPENVINO_FLOATS if openvino else int8.ONNX_FLOATS, count


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=87)
    parser.add_argument("--openvino", action="store_true")
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of the rows to measure (default: all)")
    arguments = parser.parse_args()
    path = arguments.run / "best.safetensors" if arguments.run.is_dir() else arguments.run
    model, header = load_model(path)
    val, _ = verification_images(None, path, header)
    train, _ = calibration_images(None, None, path, header, val)
    reference = Reference(TorchBackend(model, header, device="cpu"), val, max_images=arguments.images)
    folder = Path(tempfile.mkdtemp(prefix="rtdetr-bench-"))
    context = ExportContext(model, header, folder, "model", ExportOptions(), "cpu")

    def write(draft: Draft) -> tuple[Backend, float]:
        file = folder / ("model.xml" if arguments.openvino else "model.onnx")
        draft.save(file, draft.header)
        return open_backend(file, device="cpu", threads=1), sum(p.stat().st_size for p in artefact_files(file)) / 1e6

    def quantize(floats: Sequence[Island], count: int) -> Draft:
        calibration = Calibration(train, header.imgsz, count)
        if arguments.openvino:
            quantized = int8.quantize_openvino(read_float_openvino(context), calibration, context.spec, floats)
            return openvino_draft(context, quantized, "int8")
        quantized = int8.quantize_onnx(context.float_onnx, calibration, context.spec, floats)
        return onnx_draft(context, quantized, "int8")

    expected = result_of(reference.predictions())
    if arguments.openvino:
        floating, size = write(openvino_draft(context, read_float_openvino(context), "fp16"))
    else:
        floating, size = write(onnx_draft(context, context.float_onnx, "fp32"))
    assert isinstance(reference.dataset, Dataset)
    before = average_precision(reference.dataset, expected, header) or 0.0
    print(f"{path}, {len(expected)} val images: AP {before:.4f}, {size:.2f} MB")
    for number, (name, floats, count) in enumerate(recipes(arguments.openvino)):
        if arguments.rows and number not in arguments.rows:
            continue
        try:
            quantized, size = write(quantize(floats, count))
            predictions = result_of(predict(quantized, reference.paths))
            ap = average_precision(reference.dataset, predictions, header) or 0.0
        except Exception as error:  # some recipes cannot be built or run, which is a result too
            print(f"{name:58} fails: {str(error)[:80]}", flush=True)
            continue
        figures = compare_detections(list(expected.values()), list(predictions.values()), LIMITS["int8"]).figures
        pair = latencies([floating, quantized], images_to_time(None))
        errors = (
            f"score {figures['score_error'] or 0:.4f}  box {figures['box_error'] or 0:.4f}  tail {figures['tail']:.3f}"
        )
        agreement = f"AP {ap:.4f}  matched {figures['matched']:.3f}  {errors}"
        print(f"{name:58} {agreement}  {size:5.2f} MB  time {pair[1] / pair[0]:.2f}", flush=True)


if __name__ == "__main__":
    main()
