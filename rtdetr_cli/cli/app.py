"""The command line: which commands there are, and how every error leaves the program.

Start-up is part of the product: only the module of the command that is called is imported, and no command's module
imports torch, numpy, pydantic or rich before its function runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer

from rtdetr_cli.cli.aliases import translate
from rtdetr_cli.errors import EnvironmentProblem, RtdetrError, UsageError
from rtdetr_cli.version import __version__

# name -> (module below rtdetr_cli.cli, attribute, what `rtdetr --help` says). The order is that of `rtdetr --help`,
# and what it says fits into a terminal of 80 columns: click would cut a docstring in the middle of a sentence.
COMMANDS = {
    "demo": ("demo", "demo", "Go through everything on a small dataset, offline."),
    "presets": ("presets", "app", "Presets with their sizes and rates, and why."),
    "validate": ("validate", "validate", "Check a dataset; repair, split or convert a copy."),
    "train": ("train", "train", "Finetune a detector on your own images."),
    "finetune-discrete": ("finetune_discrete", "finetune_discrete", "Train the second stage, with discrete sampling."),
    "eval": ("eval", "evaluate_command", "Judge a model or detections by COCO's metrics."),
    "predict": ("predict", "predict", "Find objects in images and videos."),
    "export": ("export", "export", "Write an ONNX, OpenVINO or TensorRT file; verify it."),
    "benchmark": ("benchmark", "benchmark", "Measure latency and AP side by side."),
    "compare": ("compare", "compare", "Say whether one model is better than another."),
    "info": ("info", "info", "Say what is inside any model file."),
    "weights": ("weights", "app", "List, fetch, verify and import published weights."),
    "doctor": ("doctor", "doctor", "Say whether this machine is fit."),
}

SMALLER = "close other programs, or take a smaller --batch, --imgsz or preset"
SETTINGS: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False, "no_args_is_help": True}


def build(only: str | None = None) -> typer.Typer:
    """Build the application, with every command or with the one that is going to run."""
    app = typer.Typer(
        help="Finetune RT-DETRv2 on your own images, and deploy it.",
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        **SETTINGS,
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", "-V", help="Print the version and leave."),
    ) -> None:
        pass  # --version is answered in `run`, before anything is built

    for name, (module_name, attribute, short) in COMMANDS.items():
        if only is not None and name != only:
            continue
        target = getattr(import_module(f"rtdetr_cli.cli.{module_name}"), attribute)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=name, short_help=short)
        else:
            app.command(name=name, short_help=short)(target)
    return app


def run(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error is said here."""
    arguments = list(argv)
    # Threads that wait should sleep: on cores shared with others (the loader, say) a training step that spins at its
    # barriers was measured to take five times as long. Read once, when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if arguments[:1] in (["--version"], ["-V"]):
        sys.stdout.write(f"rtdetr {__version__}\n")
        return 0
    # Where a shell asks for completions, the words come in the environment.
    completing = "_RTDETR_COMPLETE" in os.environ
    name = None if completing else command_named(arguments)
    as_json = "--json" in arguments
    try:
        command = typer.main.get_command(build(name))
        if name is None:  # typer puts groups last
            command.commands = {n: command.commands[n] for n in COMMANDS}  # type: ignore[attr-defined]
        if name is not None:
            leaf = command.commands[name]  # type: ignore[attr-defined]
            known = {flag for p in leaf.params for flag in (*p.opts, *p.secondary_opts)}
            arguments = translate(name, arguments, known)
        code = command.main(args=arguments, prog_name="rtdetr", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except RtdetrError as error:
        return report(error, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone (`| head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or missing == "rtdetr_cli":
            raise
        missing_package = EnvironmentProblem(
            f"the package {missing} is not installed or does not import: {error}",
            hint=f"pip install {missing}",
            code="package-missing",
        )
        return report(missing_package, as_json=as_json)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return report(RtdetrError(f"{where}{error.strerror or error}", code="os"), as_json=as_json)
    except Exception as error:
        if out_of_memory(error):
            first_line = str(error).partition("\n")[0].rstrip(".")
            problem = RtdetrError(f"memory ran out: {first_line}", hint=SMALLER, code="out-of-memory")
            return report(problem, as_json=as_json)
        if not hasattr(error, "format_message"):  # click's own usage errors carry it, in every version of typer
            raise
        said = sentence(error.format_message())
        if not said:  # no arguments: the help has been asked for
            sys.stdout.write(error.ctx.get_help() + "\n" if hasattr(error, "ctx") else "")
            return 2
        hint = f"rtdetr {name} --help" if name else "rtdetr --help"
        return report(UsageError(said, hint=hint), as_json=as_json)


def out_of_memory(error: Exception) -> bool:
    """Tell memory that ran out, where nothing nearer to it could try with less, from every other error."""
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from rtdetr_cli.train.memory import is_out_of_memory

    return is_out_of_memory(error)


def command_named(arguments: list[str]) -> str | None:
    """Return the command that the arguments name, or None; a known alias is replaced in place."""
    from rtdetr_cli.cli.aliases import COMMAND_ALIASES

    if not arguments:
        return None
    arguments[0] = COMMAND_ALIASES.get(arguments[0], arguments[0])
    return arguments[0] if arguments[0] in COMMANDS else None


def sentence(text: str) -> str:
    """Return click's message in our voice: lower case at the start, no full stop at the end."""
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def report(error: RtdetrError, *, as_json: bool) -> int:
    """Say an error for people on stderr, or as one JSON line on stdout, and return its exit code."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.train import launch

    if launch.supervised():  # one process of several: the one that started it says the error, once
        launch.leave_word(error)
        return error.exit_code
    if as_json:
        terminal.emit_json(
            {
                "error": {
                    "code": error.code,
                    "message": error.message,
                    "hint": error.hint,
                    "exit_code": error.exit_code,
                }
            }
        )
    else:
        terminal.complain(launch.speaker() + error.message, error.hint)
    return error.exit_code
