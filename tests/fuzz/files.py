"""Parts that damage datasets, models and graphs.

A part is a class with `prepare(folder)`, called once in the parent to write good files, and `case(random, work)`,
called in each child with its own empty folder.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz.forked import Case
from tests.fuzz.spoil import ODD_NUMBERS, ODD_TEXTS, dump, odd_name, odd_value, spoil_bytes, spoil_document

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "tests/golden/shapes.safetensors"
NAMES = ("nut", "bolt")


def write_image(path: Path, size: tuple[int, int] = (48, 32)) -> None:
    """Write a textured image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(len(path.name)).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def write_coco(folder: Path, images: int = 4) -> Path:
    """Write a COCO dataset with a train and a val split."""
    for split in ("train", "val"):
        document: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
        document["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
        for i in range(images):
            write_image(folder / f"images/{split}_{i}.jpg")
            document["images"].append({"id": i + 1, "file_name": f"{split}_{i}.jpg", "width": 48, "height": 32})
            for k in range(2):
                box = {"id": 2 * i + k + 1, "image_id": i + 1, "category_id": k + 1, "bbox": [4 + 16 * k, 8, 14, 12]}
                document["annotations"].append({**box, "area": 168, "iscrowd": 0})
        (folder / f"{split}.json").write_text(json.dumps(document))
    return folder


class Datasets:
    """Damaged datasets of every layout: `validate`, its copies, and `eval --predictions`."""

    LAYOUTS = ("coco", "yolo", "voc", "labelme", "csv")

    def prepare(self, base: Path) -> None:
        self.base = base
        write_coco(base / "coco")
        results = [{"image_id": 1, "category_id": 1, "bbox": [4, 8, 14, 12], "score": 0.9}]
        (base / "results.json").write_text(json.dumps(results))
        for split in ("train", "val"):
            for i in range(2):
                for layout, folder in (
                    ("yolo", f"images/{split}"),
                    ("voc", "JPEGImages"),
                    ("labelme", ""),
                    ("csv", "images"),
                ):
                    write_image(base / layout / folder / f"{split}_{i}.jpg")
                name = f"{split}_{i}"
                (base / f"yolo/labels/{split}").mkdir(parents=True, exist_ok=True)
                (base / f"yolo/labels/{split}/{name}.txt").write_text("0 0.3 0.5 0.2 0.2\n1 0.6 0.5 0.2 0.3\n")
                (base / "voc/Annotations").mkdir(exist_ok=True)
                (base / f"voc/Annotations/{name}.xml").write_text(
                    f"<annotation><filename>{name}.jpg</filename><size><width>48</width><height>32</height></size>\n<object>"
                    "<name>nut</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>14</ymax></bndbox></object>"
                    "</annotation>\n"
                )
                shapes = [{"label": "nut", "points": [[2, 3], [12, 14]], "shape_type": "rectangle"}]
                document = {"shapes": shapes, "imagePath": f"{name}.jpg", "imageHeight": 32, "imageWidth": 48}
                (base / f"labelme/{name}.json").write_text(json.dumps(document, indent=1))
        (base / "yolo/data.yaml").write_text(
            "path: .\ntrain: images/train\nval: images/val\nnc: 2\nnames: [nut, bolt]\n"
        )
        heading = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
        (base / "csv/boxes.csv").write_text(heading + 3 * "train_0.jpg,48,32,nut,2,3,12,14\n")

    def case(self, random: Random, work: Path) -> Case:
        layout = random.choice(self.LAYOUTS)
        data = work / (odd_name(random) if random.random() < 0.05 else "data")
        shutil.copytree(self.base / layout, data)
        files = sorted(p for p in data.rglob("*") if p.is_file())
        labels = [p for p in files if p.suffix in (".json", ".txt", ".xml", ".csv", ".yaml")]
        for path in random.sample(labels, min(len(labels), random.randint(1, 2))):
            if path.suffix == ".json" and random.random() < 0.6:
                path.write_bytes(dump(spoil_document(random, json.loads(path.read_text()))))
            else:
                path.write_bytes(spoil_bytes(random, path.read_bytes()))
        if random.random() < 0.2:
            image = random.choice([p for p in files if p.suffix == ".jpg"])
            if random.random() < 0.5:
                image.write_bytes(spoil_bytes(random, image.read_bytes()))
            else:
                image.rename(image.with_name(odd_name(random, ".jpg")))
        if layout == "yolo" and random.random() < 0.2:
            (data / "data.yaml").write_text(self.yaml(random))
        source = data
        if layout == "coco" and random.random() < 0.5:
            source = data / "train.json"
        elif random.random() < 0.1:
            source = work / "data.zip"
            with zipfile.ZipFile(source, "w") as archive:
                for path in files:
                    if path.exists():
                        name = random.choice((odd_name(random), "../x.json")) if random.random() < 0.1 else path.name
                        archive.write(path, name.encode("utf-8", "replace").decode())
            if random.random() < 0.5:
                source.write_bytes(spoil_bytes(random, source.read_bytes()))
        if random.random() < 0.1:
            results = spoil_document(random, json.loads((self.base / "results.json").read_text()))
            (work / "results.json").write_bytes(dump(results))
            return Case(["eval", "--predictions", "results.json", "--data", str(source), "--json"])
        flags = random.choice([["--fast"], [], ["--fix", "fixed"], ["--convert", random.choice(("coco", "yolo",
        "voc")), "--to", "to"],
                               ["--html", "page.html"], ["--resplit", "0.5,0.5", "--to", "to"]])  # fmt: skip
        return Case(["validate", str(source), *flags, *random.choice(([], ["--json"]))])

    @staticmethod
    def yaml(random: Random) -> str:
        bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 20))
        return random.choice([
            bomb + "names: *a19\n", "names: &a [*a]\ntrain: images/train\n",
            "names: {0: &x nut, 1: *x}\ntrain: images/train\n",
            f"names: [a, b]\ntrain: {random.choice(ODD_TEXTS[2:])!r}\n",
            "? [a, b]\n: c\nnames: [a]\ntrain: images/train\n",
            f"names: [a, b]\ntrain: ../../images\nval: /\npath: {random.choice(('/', '..', '~', '/proc'))}\n",
            "<<: *a\n", "!!python/object/apply:os.system [x]\n", f"nc: {'9' * 5000}\nnames: [a]\ntrain: images/train\n",
        ])  # fmt: skip


class Models:
    """Damaged `.safetensors` and `.pth`: `info`, `predict`, `eval`, `export`, `verify`, `train --weights`."""

    def prepare(self, base: Path) -> None:
        import torch
        from safetensors.torch import load_file

        self.base = base
        data = MODEL.read_bytes()
        length = int.from_bytes(data[:8], "little")
        self.layout, self.tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
        self.header = json.loads(self.layout["__metadata__"]["rtdetr"])
        state = {name: t.float() if t.is_floating_point() else t for name, t in load_file(MODEL).items()}
        torch.save({"ema": {"module": state}}, base / "published.pth")
        self.state = state
        write_coco(base / "coco", 1)

    def case(self, random: Random, work: Path) -> Case:
        path = work / ("model.safetensors" if random.random() < 0.75 else random.choice(("model.pth", "model.ckpt")))
        (self.safetensors if path.suffix == ".safetensors" else self.pth)(random, path)
        json_flag = random.choice(([], ["--json"]))
        image, coco = self.base / "coco/images/train_0.jpg", self.base / "coco"
        train = ["train", "--data", coco, "--weights", path, "--device", "cpu", "--workers", "0", "--preset", "tiny"]
        slow: list[list[Any]] = [[*train, "--dry-run"], ["export", path, "--no-gate", "--out", "out"]]
        return Case(random.choice([
            ["info", path, *json_flag], ["info", path, *json_flag], ["predict", image, "-w", path, "--conf", "0.01",
            *json_flag],
            ["predict", image, "-w", path, "--save-txt", "--save-coco", "--out", "out"],
            ["eval", path, "--data", coco, *json_flag], ["verify", path, "--against", MODEL, "--data", coco],
            random.choice(slow) if random.random() < 0.2 else ["info", path],
        ]) | texts)  # fmt: skip

    def safetensors(self, random: Random, path: Path) -> None:
        layout, header = json.loads(json.dumps(self.layout)), json.loads(json.dumps(self.header))
        tensors = self.tensors
        kind = random.randint(0, 9)
        if kind <= 4:
            header = spoil_header(random, header)
        elif kind == 5:
            name = random.choice([n for n in layout if n != "__metadata__"])
            layout[name] = spoil_document(random, layout[name])
        elif kind == 6:
            layout = spoil_document(random, layout)
        elif kind == 7:
            tensors = spoil_bytes(random, tensors)
        if isinstance(layout, dict) and isinstance(layout.get("__metadata__"), dict) and kind != 6:
            layout["__metadata__"]["rtdetr"] = dump(header).decode("utf-8", "surrogatepass")
        text = dump(layout)
        if kind == 8:
            text = spoil_bytes(random, text)
        length = len(text) if kind != 9 else random.choice((0, 1, len(text) - 1, len(text) + 1, 2**63, 2**64 - 1))
        path.write_bytes(length.to_bytes(8, "little") + text + tensors)

    def pth(self, random: Random, path: Path) -> None:
        import torch

        state: dict[Any, Any] = dict(self.state)
        for name in random.sample(list(state), random.randint(1, 3)):
            old = state[name]
            state[name] = random.choice([
                torch.tensor(1.0), torch.zeros(0), old.to(torch.complex64), torch.zeros(1, device="meta"),
                old.flatten(), old[..., None],
                old.to(torch.int8), torch.zeros(1).expand(10**9), old.to_sparse(), 3, "x", None,
                torch.nn.Parameter(old.float()),
                old.expand(2, *old.shape),
            ])  # fmt: skip
            if random.random() < 0.3:
                del state[name]
            elif random.random() < 0.2:
                state[random.choice((*ODD_TEXTS, 7, None))] = state.pop(name)
        wrapped = random.choice(
            [state, {"model": state}, {"ema": {"module": state}}, {"ema": state}, [state], odd_value(random)]
        )
        try:
            torch.save(wrapped, path, _use_new_zipfile_serialization=random.random() < 0.8)
        except Exception:  # some odd values cannot be pickled
            path.write_bytes(pickle.dumps(random.choice(ODD_TEXTS)))
        if random.random() < 0.3:
            path.write_bytes(spoil_bytes(random, path.read_bytes()))


class Texts:
    """Turns the words of a command line into text: `words | texts`."""

    def __ror__(self, words: list[Any]) -> list[str]:
        return [str(word) for word in words]


texts = Texts()


def spoil_header(random: Random, header: dict[str, Any]) -> Any:
    """Damage a model's header: a field of it, or anything in it."""
    if random.random() < 0.3:
        return spoil_document(random, header)
    inner = header["architecture"] if random.random() < 0.4 else header
    for key in random.sample(list(inner), random.randint(1, 2)):
        near = [
            [0, 0],
            [64, 64],
            [10**9] * 2,
            ["\ud800", "b", "c"],
            ["a\x1b[2J", "b\nc", "d"],
            ["a"] * 1000,
            [1, 1, 1],
            {"x": [1]},
        ]
        inner[key] = random.choice([odd_value(random), random.choice(ODD_NUMBERS), random.choice(near)])
    if random.random() < 0.2:
        gate = {"passed": True, "matched": 1.0, "sha256": {"file": "x", "settings": "y", "thresholds": "z"}}
        header["extra"] = {"gate": spoil_document(random, gate), "epoch": 1}
    return header


class Graphs:
    """ONNX and OpenVINO graphs that break the contract, and the files next to an engine."""

    def prepare(self, base: Path) -> None:
        self.base = base
        write_coco(base / "coco", 1)
        data = MODEL.read_bytes()
        layout = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        self.header = json.loads(layout["__metadata__"]["rtdetr"])
        (base / "good.onnx").write_bytes(self.onnx(Random(0), good=True))
        code = "import sys, openvino as o; o.save_model(o.convert_model(sys.argv[1]), sys.argv[2])"
        subprocess.run(
            [sys.executable, "-c", code, base / "good.onnx", base / "good.xml"], check=True, capture_output=True
        )

    def case(self, random: Random, work: Path) -> Case:
        kind = random.choice(("onnx", "onnx", "onnx bytes", "xml", "xml", "engine"))
        path = work / {"onnx bytes": "m.onnx", "xml": "m.xml", "engine": "m.engine"}.get(kind, "m.onnx")
        if kind == "onnx":
            path.write_bytes(self.onnx(random))
        elif kind == "onnx bytes":
            path.write_bytes(spoil_bytes(random, (self.base / "good.onnx").read_bytes()))
        elif kind == "xml":
            self.xml(random, path)
        else:
            path.write_bytes(random.randbytes(40))
            document = dump(spoil_header(random, json.loads(json.dumps(self.header))))
            Path(f"{path}.json").write_bytes(spoil_bytes(random, document) if random.random() < 0.5 else document)
        json_flag = random.choice(([], ["--json"]))
        image, coco = self.base / "coco/images/train_0.jpg", self.base / "coco"
        return Case(random.choice([
            ["info", path, *json_flag], ["predict", image, "-w", path, "--conf", "0.01", "--out", "out", *json_flag],
            ["predict", image, "-w", path, "--save-txt", "--data", coco, "--out", "out"],
            ["eval", path, "--data", coco, *json_flag], ["verify", path, "--against", MODEL, "--data", coco,
            *json_flag],
        ]) | texts)  # fmt: skip

    def onnx(self, random: Random, *, good: bool = False) -> bytes:
        """Return a small graph with constant outputs."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        kinds = {"labels": np.int64, "boxes": np.float32, "scores": np.float32}
        shapes: dict[str, tuple[int, ...]] = {"labels": (1, 5), "boxes": (1, 5, 4), "scores": (1, 5)}
        if not good and random.random() < 0.15:
            kinds, shapes = (
                {"logits": np.float32, "boxes_cxcywh": np.float32},
                {"logits": (1, 5, 3), "boxes_cxcywh": (1, 5, 4)},
            )  # type: ignore[dict-item]
        nodes, outputs = [], []
        for name, kind in kinds.items():
            shape, dtype = shapes[name], np.dtype(kind)
            if not good and random.random() < 0.4:
                shape = random.choice(
                    [(), (5,), (1, 4), (1, 7), (1, 5, 4), (1, 0), (0,), (2, 5), (1, 5, 3), (1, 1, 1, 5), (1, 0, 4)]
                )
            if not good and random.random() < 0.2:
                dtype = np.dtype(
                    random.choice((np.float64, np.float16, np.int32, np.bool_, np.uint8, np.complex64, object))
                )
            values = np.linspace(0.9, 0.1, int(np.prod(shape))).reshape(shape) * (20 if "boxes" in name else 1)
            if not good and random.random() < 0.2:
                values = np.full(shape, random.choice((np.nan, np.inf, -1e30, 1e30, -5, 999)))
            with np.errstate(all="ignore"):
                array = np.full(shape, "x", object) if dtype.kind == "O" else values.astype(dtype)
            if not good and random.random() < 0.05:
                name = random.choice(ODD_TEXTS).encode("utf-8", "replace").decode()
            nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name)))
            outputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
        image: Any = (1, 3, 64, 64)
        types: Any = TensorProto.FLOAT
        if not good and random.random() < 0.3:
            image = random.choice(
                [
                    ("n", 3, "h", "w"),
                    (1, 3),
                    (1, 3, 10**6, 10**6),
                    (1, 64, 64, 3),
                    (0, 3, 64, 64),
                    (10**6, 3, 64, 64),
                    (1, 1, 64, 64),
                    (),
                ]
            )
            types = random.choice(
                (TensorProto.FLOAT, TensorProto.UINT8, TensorProto.STRING, TensorProto.FLOAT16, 99, TensorProto.INT4)
            )
        inputs = [
            helper.make_tensor_value_info("images", types, image),
            helper.make_tensor_value_info("orig_target_sizes", TensorProto.INT64, (1, 2)),
        ]
        # A graph without a use of its inputs is not one that OpenVINO keeps.
        nodes.append(helper.make_node("ReduceMax", ["orig_target_sizes"], ["unused"], keepdims=0))
        outputs.append(helper.make_tensor_value_info("unused", TensorProto.INT64, ()))
        nodes.append(helper.make_node("Shape", ["images"], ["unused_2"]))
        outputs.append(helper.make_tensor_value_info("unused_2", TensorProto.INT64, (len(image),)))
        model = helper.make_model(
            helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        )
        if good or random.random() < 0.5:
            header = json.loads(json.dumps(self.header))
            header.update(imgsz=[64, 64])
            text = dump(header if good or random.random() < 0.4 else spoil_header(random, header))
            entry = model.metadata_props.add()
            entry.key, entry.value = "rtdetr", text.decode("utf-8", "replace")
        if not good and random.random() < 0.1:
            model.producer_name = random.choice(ODD_TEXTS[4:])
        return onnx.load_from_string(model.SerializeToString()).SerializeToString()

    def xml(self, random: Random, path: Path) -> None:
        text = (self.base / "good.xml").read_bytes()
        path.with_suffix(".bin").write_bytes((self.base / "good.bin").read_bytes())
        changes = [
            (b'encoding="utf-8"', b'encoding="utf-16"'), (b'<?xml version="1.0"',
            b'<?xml version="1.0" encoding="klingon"'),
            (b'from-layer="1"', b'from-layer="77"'), (b"<dim>1</dim>", b"<dim>" + b"9" * 5000 + b"</dim>"),
            (b'shape="1,3,64,64"', b'shape="' + b"9" * 5000 + b'"'), (b'shape="1,3,64,64"',
            b'shape="' + "²".encode() + b'"'),
            (b'to-layer="', b'to-layer="9'), (b"f32", b"q99"), (b'name="images"', b'name="&#27;[2J"'), (b"<net",
            b"<ent"), (b'type="Result"', b""),
        ]  # fmt: skip
        if random.random() < 0.6:
            old, new = random.choice(changes)
            text = text.replace(old, new)
        else:
            text = spoil_bytes(random, text)
        path.write_bytes(text)
