"""The command line: the commands, and how an error becomes a message and an exit code.

Only the module of the command that runs is imported, and no command's module imports torch, numpy, pydantic or rich
before its function runs, so that the program starts fast.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer

from rtdetr_cli.cli.aliases import COMMAND_ALIASES, translate
from rtdetr_cli.cli.unexpected import unexpected_error
from rtdetr_cli.errors import EnvironmentProblem, RtdetrError, UsageError
from rtdetr_cli.text import suggest
from rtdetr_cli.version import __version__

# name -> (module below rtdetr_cli.cli, attribute, help), in the order of `rtdetr --help`. The help fits into a terminal
# of 80 columns; click would cut a docstring in the middle of a sentence.
COMMANDS = {
    "demo": ("demo", "demo", "Try everything on a small dataset, offline."),
    "presets": ("presets", "app", "List, show and compare presets."),
    "validate": ("validate", "validate", "Check a dataset; repair, split or convert a copy."),
    "train": ("train", "train", "Finetune a detector on your own images."),
    "finetune-discrete": ("finetune_discrete", "finetune_discrete", "Train a second stage with discrete sampling."),
    "eval": ("eval", "evaluate_command", "Compute COCO metrics of a model or of detections."),
    "predict": ("predict", "predict", "Detect objects in images and videos."),
    "export": ("export", "export", "Export to ONNX, OpenVINO or TensorRT, and verify."),
    "verify": ("verify", "verify", "Check that a file detects what a model detects."),
    "convert": ("convert", "convert", "Write a model in another maker's layout."),
    "benchmark": ("benchmark", "benchmark", "Measure latency and AP side by side."),
    "compare": ("compare", "compare", "Test whether one model is better than another."),
    "info": ("info", "info", "Show what is inside a model file."),
    "weights": ("weights", "app", "Manage published weights: list, fetch, import."),
    "doctor": ("doctor", "doctor", "Check that this machine has what a run needs."),
}


def build(only: str | None = None, *, names_only: bool = False) -> typer.Typer:
    """Build the application, with all commands or only with the one that is going to run.

    `names_only` leaves out their options, which take most of the time and which the list of commands doesn't show.
    """
    app = typer.Typer(
        help="Finetune RT-DETRv2 on your own images, and deploy it.",
        epilog="Start with: rtdetr validate YOUR_DATA. Most commands print the next one at the end.",
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", "-V", help="Print the version and exit."),
    ) -> None:
        pass  # --version is answered in `run`, before anything is built

    for name, (module_name, attribute, short) in COMMANDS.items():
        if only is not None and name != only:
            continue
        if names_only:
            app.command(name=name, short_help=short)(lambda: None)
            continue
        target = getattr(import_module(f"rtdetr_cli.cli.{module_name}"), attribute)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, short_help=short)
        else:
            app.command(name=name, short_help=short)(target)
    return app


def run(argv: Sequence[str]) -> int:
    """Run one command line, print its error if there is one, and return the exit code."""
    arguments = list(argv)
    # Waiting threads should sleep: on cores that the loader uses too, a training step that spins at its barriers was
    # measured to take five times as long. torch reads the variable once, when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if arguments[:1] in (["--version"], ["-V"]):
        sys.stdout.write(f"rtdetr {__version__}\n")
        return 0
    arguments[:1] = [COMMAND_ALIASES.get(word, word) for word in arguments[:1]]
    completing = "_RTDETR_COMPLETE" in os.environ  # a shell that asks for completions passes the words there
    name = arguments[0] if arguments and arguments[0] in COMMANDS and not completing else None
    try:
        command = typer.main.get_command(build(name, names_only=name is None and not completing))
        if name is None:  # typer puts groups last
            command.commands = {n: command.commands[n] for n in COMMANDS}  # type: ignore[attr-defined]
        else:
            parameters = command.commands[name].params  # type: ignore[attr-defined]
            known = {flag for p in parameters for flag in (*p.opts, *p.secondary_opts)}
            arguments = translate(name, arguments, known)
        code = command.main(args=arguments or ["--help"], prog_name="rtdetr", standalone_mode=False)
        if not arguments:  # no command was given, so nothing was done
            return 2
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        # The reader of the pipe has gone (`| head`), so there is nobody to report to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return report(expected_error(error, name) or unexpected_error(error, arguments), as_json="--json" in arguments)


PIP_NAMES = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml"}


def expected_error(error: Exception, command: str | None) -> RtdetrError | None:
    """Return an error with a message and an exit code for what users can run into; None for a bug."""
    if isinstance(error, RtdetrError):
        return error
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if not package or package == "rtdetr_cli":
            return None
        message = f"the package {package} is not installed, or importing it fails: {error}"
        return EnvironmentProblem(
            message, hint=f"pip install {PIP_NAMES.get(package, package)}", code="package-missing"
        )
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return RtdetrError(f"{where}{error.strerror or error}", code="os")
    if out_of_memory(error):
        first_line = str(error).partition("\n")[0].rstrip(".")
        hint = "close other programs, or use a smaller --batch, --imgsz or preset"
        return RtdetrError(f"out of memory: {first_line}", hint=hint, code="out-of-memory")
    if hasattr(error, "format_message"):  # a usage error of click; its class depends on the version of typer
        hint = f"rtdetr {command} --help" if command else "rtdetr --help"
        return UsageError(_usage_message(error), hint=hint)
    return None


def _usage_message(error: Any) -> str:
    """Return click's message in our style: no capital, no period, and the closest name as `did you mean`."""
    if (option := getattr(error, "option_name", None)) and hasattr(error, "possibilities"):
        return f"no such option {option}{suggest(option, error.possibilities or ())}"
    text = " ".join(error.format_message().split()).rstrip(".")
    text = re.sub(r"\. Did you mean '([^']+)'.*", r" (did you mean \1?)", text)
    return text[:1].lower() + text[1:]


def out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from rtdetr_cli.train.memory import is_out_of_memory

    return is_out_of_memory(error)


def report(error: RtdetrError, *, as_json: bool) -> int:
    """Print an error for people on stderr, or as one JSON line on stdout, and return its exit code."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.train import launch

    if launch.supervised():  # the process that started this one prints the error, once
        launch.report_to_parent(error)
        return error.exit_code
    if as_json:
        fields = ("code", "message", "hint", "exit_code")
        terminal.emit_json({"error": {field: getattr(error, field) for field in fields}})
    else:
        terminal.complain(launch.process_prefix() + error.message, error.hint)
    return error.exit_code
