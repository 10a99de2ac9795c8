"""The command line as a whole: start-up time, errors, aliases, exit codes, presets."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rtdetr_cli.cli.aliases import FLAG_ALIASES, translate
from rtdetr_cli.cli.app import COMMANDS

HEAVY = ("torch", "torchvision", "numpy", "pydantic", "onnx", "onnxruntime", "openvino", "rich", "PIL", "cv2", "scipy",
         "albumentations", "matplotlib", "jinja2", "hotcoco", "pycocotools")  # fmt: skip


def modules_after(*arguments: str) -> set[str]:
    """Run a command line in a fresh interpreter and return the heavy packages it imported."""
    code = (
        "import sys\n"
        "from rtdetr_cli.cli.app import run\n"
        f"code = run({list(arguments)!r})\n"
        f"sys.stderr.write('\\nLOADED ' + ' '.join(m for m in {HEAVY!r} if m in sys.modules))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ran.stderr.rpartition("LOADED")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert modules_after(*arguments) == set()


def test_help_lists_every_command(rtdetr) -> None:
    ran = rtdetr("--help", code=0)
    for name in COMMANDS:
        assert f"\n  {name} " in ran.out


@pytest.mark.parametrize("group", [[], ["presets"], ["weights"]])
def test_command_lists_fit_into_80_columns(rtdetr, group: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = rtdetr(*group, "--help")
    listed = ran.out.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert len(listed) == (len(COMMANDS) if not group else len(listed)) > 2, "each command has one line"
    for line in listed:
        assert line.endswith("."), line
        assert not line.endswith("...")
        assert len(line) <= 80
    if not group:
        assert [line.split()[0] for line in listed] == list(COMMANDS)


def test_without_a_command_the_help_is_printed(rtdetr) -> None:
    ran = rtdetr()
    assert (ran.code, ran.err) == (2, "")
    assert ran.out == rtdetr("--help").out
    for group, listed in (("presets", "r18"), ("weights", "cache: ")):
        ran = rtdetr(group)
        assert (ran.code, ran.err) == (0, "")
        assert listed in ran.out


REFUSED = [
    ("train --resume gone", "the run gone does not exist"),
    ("train gone", "the dataset gone does not exist"),
    ("finetune-discrete --resume gone", "the run gone does not exist"),
    ("finetune-discrete MODEL --data gone", "the dataset gone does not exist"),
    ("export gone", "the model gone does not exist"),
    ("export MODEL --verify gone", "the dataset gone does not exist"),
    ("export MODEL", "no images to verify on"),
    ("export MODEL --openvino --no-gate", "OpenVINO is not installed"),
    ("export MODEL --opset 16", "LayerNormalization"),
    ("eval MODEL --data gone", "the dataset gone does not exist"),
    ("benchmark gone", "the model gone does not exist"),
]


def test_refusals_come_before_torch_is_loaded(shapes_model) -> None:
    """All of them in one fresh interpreter, since each start takes a second."""
    commands = [line.replace("MODEL", str(shapes_model)).split() for line, _ in REFUSED]
    code = (
        "import sys, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'openvino' else find(name, *rest)\n"
        "from rtdetr_cli.cli.app import run\n"
        f"for words in {commands!r}:\n"
        "    assert run(words), 'it was not refused'\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    for line, (_, message) in zip(errors, REFUSED, strict=True):
        assert message in line


def test_the_package_runs_as_a_module() -> None:
    ran = subprocess.run([sys.executable, "-m", "rtdetr_cli", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("rtdetr ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nonsense"], 2, "no such command 'nonsense'"),
        (["predct"], 2, "no such command 'predct' (did you mean predict?)"),
        (["weights", "fetchh"], 2, "no such command 'fetchh' (did you mean fetch?)"),
        (["presets", "--nonsense"], 2, "no such option --nonsense"),
        (["train", "--epoch", "3"], 2, "no such option --epoch (did you mean --epochs?)"),
        (["predict", "--save-jso", "x"], 2, "no such option --save-jso (did you mean --save-json?)"),
        (["presets", "show", "r19"], 2, "did you mean r18?"),
        (["presets", "show", "gone.toml"], 2, "gone.toml does not exist"),
        (["presets", "diff", "r18"], 2, "missing argument"),
        (["train", "--epochs", "many", "--data", "x"], 2, "'many' is not a valid"),
        (["train", "--batch", "many", "--data", "x"], 2, "--batch many: expected auto or an integer >= 1"),
    ],
)
def test_usage_errors_are_one_sentence(rtdetr, arguments: list[str], code: int, message: str) -> None:
    ran = rtdetr(*arguments, code=code)
    assert ran.out == ""
    assert message in ran.err.lower() or message in ran.err
    assert ran.err.startswith("error: ")


@pytest.mark.parametrize(
    ("module", "package"), [("hotcoco.core", "hotcoco"), ("cv2", "opencv-python-headless"), ("PIL.Image", "pillow")]
)
def test_a_missing_package_is_an_environment_error(module: str, package: str) -> None:
    from rtdetr_cli.cli.app import expected_error

    error = expected_error(ModuleNotFoundError(f"No module named '{module}'", name=module), "eval")
    assert error is not None
    assert (error.code, error.exit_code, error.hint) == ("package-missing", 7, f"pip install {package}")


def test_a_bug_is_no_missing_package() -> None:
    from rtdetr_cli.cli.app import expected_error

    assert expected_error(ModuleNotFoundError("bug", name="rtdetr_cli.gone"), "eval") is None
    assert expected_error(ValueError("bug"), "eval") is None


def test_a_preset_is_printed_in_one_format(rtdetr) -> None:
    ran = rtdetr("presets", "show", "r18", "--toml", "--json", code=2)
    assert "cannot be combined" in ran.json["error"]["message"]


def test_errors_are_json_with_the_json_flag(rtdetr) -> None:
    ran = rtdetr("presets", "show", "r19", "--json", code=2)
    assert ran.json["error"]["code"] == "preset-unknown"
    assert ran.json["error"]["exit_code"] == 2
    assert ran.json["schema_version"] == 1


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("train", ["train", "--batch_size=4"], ["train", "--batch=4"]),
        ("train", ["train", "--batch-size", "4"], ["train", "--batch", "4"]),
        ("train", ["train", "--output_dir", "x"], ["train", "--out", "x"]),
        ("train", ["train", "--use-amp"], ["train", "--precision", "auto"]),
        ("train", ["train", "--model", "x.pth"], ["train", "--weights", "x.pth"]),
        ("train", ["train", "--effective_batch", "8"], ["train", "--effective-batch", "8"]),
        ("train", ["train", "--nonsense"], ["train", "--nonsense"]),
        ("train", ["train", "--", "--batch_size"], ["train", "--", "--batch_size"]),
    ],
)
def test_foreign_flag_names_are_translated(command: str, typed: list[str], meant: list[str]) -> None:
    known = {"--batch", "--out", "--precision", "--weights", "--effective-batch"}
    assert translate(command, typed, known) == meant


def test_a_model_flag_becomes_a_positional_argument() -> None:
    assert translate("eval", ["eval", "--model=a.onnx"], {"--data"}) == ["eval", "a.onnx"]
    assert translate("predict", ["predict", "--source", "a.jpg"], {"--weights"}) == ["predict", "a.jpg"]
    assert translate("export", ["export", "--format=onnx,openvino"], {"--onnx", "--openvino"}) == [
        "export", "--onnx", "--openvino",
    ]  # fmt: skip


def test_every_alias_stands_for_an_existing_flag() -> None:
    import typer

    from rtdetr_cli.cli.app import build

    group = typer.main.get_command(build())
    known = {flag for c in group.commands.values() for p in c.params for flag in (*p.opts, *p.secondary_opts)}
    for old, new in FLAG_ALIASES.items():
        for flag in new:
            assert not flag.startswith("--") or flag in known, f"{old} -> {flag}"


def test_val_is_an_alias_of_eval(rtdetr) -> None:
    assert rtdetr("val", "--help").out == rtdetr("eval", "--help").out


def test_presets_show_describes_every_key(rtdetr) -> None:
    rows = rtdetr("presets", "show", "r18").out.splitlines()
    row = next(line for line in rows if "model.queries" in line)
    assert row.split() == ["model.queries", "300", "object", "queries"]


def test_presets_in_json(rtdetr) -> None:
    ran = rtdetr("presets", "list", "--json")
    names = [p["name"] for p in ran.json["presets"]]
    assert names == ["tiny", "r18", "r34", "r50m", "r50", "r101", "hgl", "hgx", "hgh"]


def test_presets_diff_shows_the_differences_and_the_reasons(rtdetr) -> None:
    ran = rtdetr("presets", "diff", "r18", "r50")
    assert "optim.lr_backbone" in ran.out
    assert "1e-05" in ran.out
    assert "a tenth of the head's learning rate" in ran.out
    assert "model.heads" not in ran.out


def test_a_preset_printed_as_toml_is_a_valid_preset_file(rtdetr, tmp_path) -> None:
    copied = tmp_path / "mine.toml"
    copied.write_text(rtdetr("presets", "show", "r18", "--toml").out)
    again = rtdetr("presets", "show", copied, "--json").json["preset"]
    assert again == rtdetr("presets", "show", "r18", "--json").json["preset"]


def test_json_output_replaces_nan_and_infinity() -> None:
    from rtdetr_cli.cli.terminal import finite

    assert json.dumps(finite({"a": float("nan"), "b": [float("inf"), 1.5]})) == '{"a": null, "b": [null, 1.5]}'


def test_a_bug_becomes_one_sentence_and_a_file_with_the_traceback(
    rtdetr, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rtdetr_cli.cli import unexpected

    def fail(*_: object) -> None:
        raise ValueError("two\nlines \x1b[2J")

    monkeypatch.setattr("rtdetr_cli.config.presets.load_preset", fail)
    with pytest.raises(ValueError, match="two"):
        rtdetr("presets", "show", "r18")

    monkeypatch.delenv("RTDETR_CLI_TRACEBACK")
    monkeypatch.setenv("RTDETR_CLI_HOME", str(tmp_path / "cache"))
    for folder in (None, tmp_path / "run"):
        unexpected.remember_run(folder)
        ran = rtdetr("presets", "show", "r18", code=1)
        (path,) = (folder or tmp_path / "cache/tracebacks").glob("traceback-*.txt")
        assert ran.err.startswith(f"error: unexpected ValueError: two lines \\x1b[2J; the traceback is in {path}\n")
        assert "report it" in ran.err
        assert "in fail" in path.read_text()
    assert rtdetr("presets", "show", "r18", "--json").json["error"]["code"] == "unexpected"
    unexpected.remember_run(None)


def test_what_reaches_the_screen_cannot_control_it(capfd: pytest.CaptureFixture[str]) -> None:
    from rtdetr_cli.cli import terminal

    attack = "a\x1b[2J\x9b31m\x7f\u202e\udcff"
    shown = "a\\x1b[2J\\x9b31m\\x7f\\u202e\\udcff"
    terminal.out(f"{attack}\nnext line")
    terminal.table((attack,), [(attack + "\n[/bold]",)], title=attack + "[/red]")
    out, _ = capfd.readouterr()
    assert out.startswith(f"{shown}\nnext line\n")
    assert out.count(shown) == 4
    assert "\\n[/bold]" in out
    assert "[/red]" in out
    terminal.complain(attack + "\nerror: forged", attack)
    _, err = capfd.readouterr()
    assert err == f"error: {shown}\\nerror: forged\n\nhint: {shown}\n"
    terminal.emit_json({"name": attack})
    out, _ = capfd.readouterr()
    assert out.isascii()
    assert json.loads(out)["name"] == attack
