"""`rtdetr presets`: what there is, what is in it, and how two of them differ."""

from __future__ import annotations

from typing import Annotated

import typer

from rtdetr_cli.cli import terminal

app = typer.Typer(
    help="Presets with their sizes and learning rates, and why.",
    rich_markup_mode=None,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on one line.")]


@app.callback()
def root(context: typer.Context, as_json: Json = False) -> None:
    """List the presets with their sizes and learning rates, and why."""
    if context.invoked_subcommand is None:
        list_presets(as_json)


@app.command("list")
def list_presets(as_json: Json = False) -> None:
    """List the presets."""
    from rtdetr_cli.config.presets import load_preset, preset_names

    found = [load_preset(name) for name in preset_names()]
    if as_json:
        terminal.emit_json({"presets": [p.model_dump(mode="json") for p in found]})
        return
    terminal.table(
        ("preset", "M params", "COCO AP", "lr", "lr backbone", "layers", "what"),
        [
            (
                p.name,
                f"{p.params_m:.1f}",
                p.published_ap,
                f"{p.optim.lr:.0e}",
                f"{p.optim.lr_backbone:.0e}",
                f"{p.model.eval_layers}/{p.model.decoder_layers}",
                p.description,
            )
            for p in found
        ],
    )
    terminal.out("COCO AP: as published for val2017. layers: used/trained. Details: rtdetr presets show NAME")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A preset's name, or the path of a TOML file.")],
    toml: Annotated[bool, typer.Option("--toml", help="Print the file itself, to copy and change.")] = False,
    as_json: Json = False,
) -> None:
    """Show every value of one preset with what it means."""
    from pathlib import Path

    from rtdetr_cli.config.presets import describe, flatten, load_preset, preset_folder
    from rtdetr_cli.config.schema import Preset

    preset = load_preset(name)
    if toml:
        path = Path(name) if name.endswith(".toml") else preset_folder() / f"{name}.toml"
        terminal.out(path.read_text(encoding="utf-8").rstrip("\n"))
    elif as_json:
        terminal.emit_json({"preset": preset.model_dump(mode="json")})
    else:
        terminal.table(
            ("key", "value", "what"),
            [(key, spell(value), describe(Preset, key)) for key, value in flatten(preset).items()],
            title=f"{preset.name}: {preset.description}",
        )


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A preset.")],
    b: Annotated[str, typer.Argument(help="Another preset.")],
    as_json: Json = False,
) -> None:
    """Show what differs between two presets, and why."""
    from rtdetr_cli.config.presets import flatten, load_preset

    first, second = load_preset(a), load_preset(b)
    left, right = flatten(first), flatten(second)
    rows = [(key, left[key], right[key]) for key in left if left[key] != right[key]]
    if as_json:
        terminal.emit_json({"a": a, "b": b, "differences": {k: [x, y] for k, x, y in rows}})
        return
    told = [row for row in rows if row[0] not in ("name", "description", "optim.why")]
    terminal.table(("key", a, b), [(key, spell(x), spell(y)) for key, x, y in told])
    terminal.out(f"{a}: {first.optim.why}")
    terminal.out(f"{b}: {second.optim.why}")


def spell(value: object) -> str:
    """Return a value as a person would write it in TOML."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return "[" + ", ".join(spell(v) for v in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else str(value)
