from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from rtdetr_cli.evaluate.thresholds import stale_exports, store_thresholds
from rtdetr_cli.weights.binding import read_export_header, record_verdict
from rtdetr_cli.weights.header import Thresholds, read_header, rewrite_header
from rtdetr_cli.weights.load import tensors_identity

METRICS = {"AP": 0.504581, "AP50": 0.696973, "AP75": 0.572982, "APs": 0.585626, "APm": 0.519400, "APl": 0.501398}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rtdetr_cli.datasets.generate import generate_dataset

    folder = tmp_path_factory.mktemp("eval") / "shapes"
    generate_dataset(folder, train=2, val=10, imgsz=96, seed=0)
    return folder


@pytest.fixture(scope="module")
def run_folder(data: Path, write_untrained: Callable[..., Path]) -> Path:
    """A run folder with random weights, as training would leave it."""
    best = write_untrained(data.parent / "runs/tiny-shapes-01/best.safetensors", data, (96, 96), preset="tiny")
    (best.parent / "config.toml").write_text(f"data = {json.dumps(str(data))}\nseed = 0\nval_fraction = 0.2\n")
    return best.parent


@pytest.fixture(scope="module")
def onnx_file(run_folder: Path) -> Path:
    from rtdetr_cli.export.options import ExportOptions
    from rtdetr_cli.export.run import export_model
    from rtdetr_cli.weights.load import load_model

    model, header = load_model(run_folder / "best.safetensors")
    return export_model(model, header, run_folder / "export", ExportOptions(), stem="best")[0].path


@pytest.fixture
def own_run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the run, with the exports that exist, to store thresholds in."""
    return shutil.copytree(run_folder, tmp_path / "runs" / "own")


# ----------------------------------------------------------------------------------------- detections from a file


@pytest.fixture
def public(eval_pair: Path) -> tuple[object, ...]:
    """A public file of detections; the images do not exist, and need not."""
    return "eval", "--data", eval_pair / "ground_truth.json", "--predictions", eval_pair / "detections.json"


@pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])
def test_predictions_give_the_published_metrics(rtdetr: Any, public: tuple[object, ...], evaluator: str) -> None:
    ran = rtdetr(*public, "--evaluator", evaluator, "--json", code=0)
    assert {name: ran.json["metrics"][name] for name in METRICS} == pytest.approx(METRICS, abs=1e-6)
    assert ran.json["evaluator"] == evaluator
    assert ran.json["schema_version"] == 1
    person = ran.json["per_class"][0]
    assert (person["name"], person["category_id"]) == ("person", 1)
    errors = ran.json["errors"]
    assert sum(map(sum, errors["confusion"]["matrix"])) > 0
    assert errors["duplicates"]["removed"] >= 0.8 * errors["duplicates"]["of"]


def test_the_next_step_is_printed(rtdetr: Any, run_folder: Path, data: Path) -> None:
    ran = rtdetr("eval", run_folder, "--data", data, "--device", "cpu", code=0)
    assert ran.err.splitlines()[-1] == f"next: rtdetr export {run_folder}"
    assert "next: " not in rtdetr("eval", run_folder, "--data", data, "--device", "cpu", "--json").err


def test_text_and_json_agree(rtdetr: Any, public: tuple[object, ...]) -> None:
    document = rtdetr(*public, "--ci", 200, "--json").json
    ran = rtdetr(*public, "--ci", 200)
    interval = document["interval"]
    assert interval["lower"] < document["metrics"]["AP"] < interval["upper"]
    assert f"AP 0.505 ± {interval['half']:.3f} (95%, 100 images)" in ran.out
    rows = {row["name"]: row for row in document["per_class"]}
    assert "interval" in rows["person"]
    assert "interval" not in rows["umbrella"]  # a single box

    assert "\n\n\n" not in ran.out
    lines = ran.out.splitlines()
    (best,) = [i for i, line in enumerate(lines) if line.startswith("best F1 with one threshold for all classes")]
    assert lines[best + 1 : best + 3] == ["", "Errors"]
    assert "errors are counted at score 0." in ran.out
    assert "annotations of classes with an AP50 below 0.5 are not questioned (" in ran.out
    assert document["errors"]["suspects_note"] in ran.out
    weak = {name for name, row in rows.items() if (row["AP50"] or 1) < 0.5}
    assert weak <= set(document["errors"]["suspects_left_out"])


def test_results_of_another_dataset(rtdetr: Any, eval_pair: Path, tmp_path: Path) -> None:
    rows = json.loads((eval_pair / "detections.json").read_text())
    rows[3]["image_id"] = 10**9
    rows[5]["category_id"] = 999
    (tmp_path / "r.json").write_text(json.dumps(rows))
    ran = rtdetr("eval", "--data", eval_pair / "ground_truth.json", "--predictions", tmp_path / "r.json", "--json")
    assert ran.code == 3
    assert "1000000000" in ran.json["error"]["message"]
    assert "999" in ran.json["error"]["message"]


@pytest.mark.parametrize(("least", "code"), [("0.5", 0), ("0.51", 6)])
def test_fail_under(rtdetr: Any, public: tuple[object, ...], least: str, code: int) -> None:
    ran = rtdetr(*public, "--fail-under", least, code=code)
    assert ("error: AP 0.5046 is below 0.51" in ran.err) == bool(code)
    ran = rtdetr(*public, "--fail-under", least, "--json", code=code)
    assert ran.json["gate"] == {"fail_under": float(least), "passed": not code}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictions", "r.json"], "needs the dataset"),
        (["m.onnx", "--predictions", "r.json", "--data", "d"], "MODEL cannot be used"),
        (["--predictions", "r.json", "--data", "d", "--layers", "2", "--calibrate", "f1"], "--layers and --calibrate"),
        (["m.onnx", "--fail-under", "40"], "not a fraction"),
        (["m.onnx", "--evaluator", "other"], "no evaluator 'other'"),
        (["m.onnx", "--imgsz", "100"], "not a multiple of 32"),
        (["m.onnx", "--batch", "many"], "not a number of images"),
        (["m.onnx", "--calibrate", "recall"], "not a target"),
        (["m.safetensors", "--calibrate", "f1", "--split", "train"], "--calibrate cannot use the train split"),
    ],
)
def test_invalid_options(rtdetr: Any, words: list[str], message: str) -> None:
    rtdetr("eval", *words, code=2, err=message)


# ------------------------------------------------------------------------------------------------------ a model


def test_a_run_is_evaluated_on_its_own_dataset(rtdetr: Any, run_folder: Path, data: Path, tmp_path: Path) -> None:
    results = tmp_path / "deep" / "results.json"
    ran = rtdetr("eval", run_folder, "--save-json", results, "--json", code=0)
    assert ran.json["dataset"] == {"name": "shapes", "split": "val"}
    assert ran.json["pictures"] == 10
    assert ran.json["model"]["kind"] == "torch"
    again = rtdetr("eval", "--data", data, "--predictions", results, "--json")
    assert again.json["metrics"] == pytest.approx(ran.json["metrics"], abs=1e-4)


def test_a_verified_export_is_evaluated_with_backend_auto(rtdetr: Any, onnx_file: Path, own_run: Path) -> None:
    file = own_run / "export" / onnx_file.name
    shutil.copy(onnx_file, file)
    header = read_export_header(file)
    assert header is not None
    record_verdict(file, header, {"passed": True})
    command = ("eval", own_run, "--device", "cpu", "--json")
    with_torch, chosen = rtdetr(*command), rtdetr(*command, "--backend", "auto")
    assert (with_torch.code, chosen.code) == (0, 0), chosen.err
    assert f"backend  onnx: {file} was verified" in chosen.err
    assert (with_torch.json["model"]["kind"], chosen.json["model"]["kind"]) == ("torch", "onnx")
    assert chosen.json["metrics"]["AP"] == pytest.approx(with_torch.json["metrics"]["AP"], abs=1e-4)


def test_layers_queries_size_and_split(rtdetr: Any, run_folder: Path) -> None:
    options = ("--layers", 1, "--queries", 20, "--imgsz", "64x96", "--split", "train", "--batch", 1)
    ran = rtdetr("eval", run_folder, *options, "--json", code=0)
    model = ran.json["model"]
    assert (model["layers"], model["queries"], model["imgsz"]) == (1, 20, [64, 96])
    assert ran.json["dataset"]["split"] == "train"
    assert ran.json["detections"] <= 2 * 100
    assert rtdetr("eval", run_folder, "--layers", 9).code == 2


def test_calibration_is_stored_and_older_exports_are_listed(rtdetr: Any, onnx_file: Path, own_run: Path) -> None:
    best, export = own_run / "best.safetensors", own_run / "export" / onnx_file.name
    before, tensors = read_header(best), tensors_identity(load_file(best))
    ran = rtdetr("eval", own_run, "--calibrate", "f1")
    assert "errors are counted at the thresholds calibrated now for f1" in ran.out
    ran = rtdetr("eval", own_run, "--calibrate", "f1", "--json", code=0)
    header, calibration = read_header(best), ran.json["calibration"]
    assert list(header.thresholds.per_class) == [row["threshold"] for row in calibration["per_class"]]
    assert (header.identity, tensors_identity(load_file(best))) == (before.identity, tensors)
    assert calibration["stale_exports"] == [str(export)]
    assert f"{export} was exported before" in ran.err
    # the next evaluation reports the stored thresholds
    later = rtdetr("eval", own_run, "--json").json["at_thresholds"]
    assert later["target"] == "f1"
    assert later["overall"] == calibration["at_thresholds"]


def test_thresholds_calibrated_with_other_layers_give_a_warning(rtdetr: Any, own_run: Path, data: Path) -> None:
    best, same = own_run / "best.safetensors", ("--layers", 1, "--queries", 50)
    assert rtdetr("eval", own_run, "--calibrate", "f1", *same).code == 0
    stored = read_header(best).thresholds
    assert (stored.imgsz, stored.layers, stored.queries) == ((96, 96), 1, 50)
    warning = "warning: the stored thresholds were calibrated at 1 layer, 50 queries and are used at 3 layers, 100 "
    image = next(data.rglob("*.jpg"))
    for command in (("eval", own_run), ("predict", image, "--weights", own_run, "--no-save")):
        assert warning in rtdetr(*command).err
        assert "were calibrated" not in rtdetr(*command, *same).err
    assert f"rtdetr eval {best} --layers 3 --queries 100 --calibrate f1" in rtdetr(*command).err


def test_exports_of_the_original_in_a_finetune_discrete_run_are_searched(
    rtdetr: Any, onnx_file: Path, own_run: Path
) -> None:
    """They belong to the model that finetune-discrete started from, not to its result."""
    second = own_run.parent / "second"
    (second / "export-original").mkdir(parents=True)
    original = second / "export-original" / "best.onnx"
    shutil.copy(onnx_file, original)
    ran = rtdetr("eval", own_run, "--calibrate", "f1", "--json", code=0)
    calibration = ran.json["calibration"]
    assert calibration["stale_exports"] == [str(own_run / "export/best.onnx"), str(original)]
    folders = [str(own_run / "export"), str(original.parent)]
    assert calibration["export_folders"] == folders
    assert f"searched for older exports in {', '.join(folders)}" in ran.err
    # the result of finetune-discrete has no export here
    result = second / "best.safetensors"
    shutil.copy(own_run / "best.safetensors", result)
    header = replace(read_header(result), thresholds=Thresholds("f1", 0.5, (0.5,) * 5))
    assert stale_exports(result, header) == [original]
    assert stale_exports(result, replace(header, identity="another")) == []


def test_the_table_of_thresholds_separates_per_class_and_single_thresholds(rtdetr: Any, own_run: Path) -> None:
    best = own_run / "best.safetensors"
    rewrite_header(best, replace(read_header(best), thresholds=Thresholds("f1", 0.001, (0.9,) * 5)))
    lines = [line.split() for line in rtdetr("eval", own_run).out.splitlines()]
    (per_class,) = [
        line[1:] for line in lines if line[:7] == ["all", "classes,", "each", "at", "its", "own", "threshold"]
    ]
    (single,) = [line for line in lines if line[:5] == ["all", "classes", "at", "one", "threshold"]]
    assert per_class[6] == "-"
    assert single[5] == "0.001"
    assert len(per_class[6:]) == len(single[5:]) == 4
    assert per_class[7:] != single[6:]


def test_an_onnx_file_is_evaluated_without_torch(onnx_file: Path) -> None:
    program = (
        "import sys; from rtdetr_cli.cli.app import run; "
        f"code = run(['eval', {str(onnx_file)!r}, '--ci', '50', '--json']); "
        "assert 'torch' not in sys.modules, 'torch was loaded'; sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["model"]["kind"] == "onnx"
    assert document["pictures"] == 10


def test_a_foreign_onnx_file_uses_the_datasets_classes_in_order(
    rtdetr: Any, data: Path, onnx_file: Path, tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(onnx_file)
    del model.metadata_props[:]
    foreign = tmp_path / "foreign.onnx"
    onnx.save(model, foreign)
    ran = rtdetr("eval", foreign, "--data", data, "--json", code=0)
    assert "has no class names" in ran.err
    assert ran.json["metrics"] == rtdetr("eval", onnx_file, "--data", data, "--json").json["metrics"]


def test_a_model_without_a_dataset(rtdetr: Any, run_folder: Path, data: Path, tmp_path: Path) -> None:
    lonely = shutil.copy(run_folder / "best.safetensors", tmp_path / "lonely.safetensors")
    rtdetr("eval", lonely, code=2, err="no dataset given")
    assert rtdetr("eval", lonely, "--data", tmp_path / "nothing").code == 3
    ran = rtdetr("eval", lonely, "--data", data, "--split", "test", code=3)
    assert "has no test split; it has train (2 images), val (10 images)" in ran.err


def write_pair(folder: Path, images: int, found: list[dict[str, Any]]) -> tuple[object, ...]:
    """Write a dataset without boxes and detections in it; return the options that name both."""
    entries = [{"id": i + 1, "file_name": f"{i}.jpg", "width": 80, "height": 60} for i in range(images)]
    content = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (folder / "data.json").write_text(json.dumps(content))
    (folder / "results.json").write_text(json.dumps(found))
    return "--data", folder / "data.json", "--predictions", folder / "results.json"


def test_a_split_without_boxes_has_no_ap(rtdetr: Any, tmp_path: Path) -> None:
    files = write_pair(tmp_path, 1, [])
    ran = rtdetr("eval", *files, "--split", "train", "--ci", 100, "--json", code=0)
    assert set(ran.json["metrics"].values()) == {None}
    assert "has no boxes, so AP is not defined" in ran.err
    rtdetr("eval", *files, "--split", "train", "--fail-under", "0.1", code=6, err="AP is not defined")


def test_false_positives_on_images_without_objects(rtdetr: Any, tmp_path: Path) -> None:
    found = [{"image_id": 1, "category_id": 1, "bbox": [x, 5, 10, 10], "score": 0.9} for x in (5, 25, 45)]
    ran = rtdetr("eval", *write_pair(tmp_path, 2, found), code=0)
    assert "2 images without objects: 1.50 false positives per image, in 1 of them" in ran.out


def test_outputs_are_checked_before_the_work(rtdetr: Any, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for flag in ("--save-json", "--html"):
        for target, code in ((tmp_path, 2), (tmp_path / "file" / "x.json", 1)):
            ran = rtdetr("eval", run_folder, flag, target, code=code)
            assert flag in ran.err
            assert "images/s" not in ran.err


def test_stored_thresholds_are_in_the_models_class_order(own_run: Path) -> None:
    labels = np.array([1, -1, 0, -1, -1])
    header = store_thresholds(own_run / "best.safetensors", Thresholds("f1", 0.4, (0.1, 0.2)), labels)
    assert header.thresholds == Thresholds("f1", 0.4, (0.2, 0.4, 0.1, 0.4, 0.4))


def test_stored_thresholds_give_the_same_metrics_from_the_onnx_file(
    rtdetr: Any, shapes_model: Path, shapes_onnx: Path, shapes_data: Path
) -> None:
    """Of a trained model: random scores are all ties."""
    files = (shapes_model, shapes_onnx)
    documents = [
        rtdetr("eval", file, "--data", shapes_data, "--device", "cpu", "--json", code=0).json for file in files
    ]
    ours, exported = (document["at_thresholds"] for document in documents)
    assert ours["overall"]["f1"] > 0.5
    assert exported == ours
