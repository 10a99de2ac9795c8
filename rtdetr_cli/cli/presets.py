"""`rtdetr presets`: list the presets, show one, and compare two."""

from __future__ import annotations

from typing import Annotated

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import JsonFlag
from rtdetr_cli.errors import UsageError

app = terminal.command_group("List, show and compare presets.")


@app.callback()
def root(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List, show and compare presets: model sizes and learning rates. Without a command: list."""
    if context.invoked_subcommand is None:
        list_presets(as_json)


@app.command("list")
def list_presets(as_json: JsonFlag = False) -> None:
    """List the presets."""
    from rtdetr_cli.config.presets import load_preset, preset_names

    presets = [load_preset(name) for name in preset_names()]
    if as_json:
        terminal.emit_json({"presets": [p.model_dump(mode="json") for p in presets]})
        return
    rows = []
    for p in presets:
        rates = (f"{p.optim.lr:.0e}", f"{p.optim.lr_backbone:.0e}")
        layers = f"{p.model.eval_layers}/{p.model.decoder_layers}"
        rows.append((p.name, f"{p.params_m:.1f}", p.published_ap, *rates, layers, p.description))
    terminal.table(("preset", "M params", "COCO AP", "lr", "lr backbone", "layers", "description"), rows)
    terminal.out("COCO AP: as published for val2017. layers: used/trained. Details: rtdetr presets show NAME")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a preset, or path of a preset file.")],
    toml: Annotated[bool, typer.Option("--toml", help="Print the preset file, to copy and edit.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show every value of a preset with its meaning."""
    from rtdetr_cli.config.presets import descriptions, flatten, load_preset, preset_path
    from rtdetr_cli.config.schema import Preset

    if toml and as_json:
        raise UsageError("--toml and --json cannot be combined")
    preset = load_preset(name)
    if toml:
        terminal.out(preset_path(name).read_text(encoding="utf-8").rstrip("\n"))
    elif as_json:
        terminal.emit_json({"preset": preset.model_dump(mode="json")})
    else:
        texts = descriptions(Preset)
        terminal.table(
            ("key", "value", "description"),
            [(key, spell(value), texts[key]) for key, value in flatten(preset).items()],
            title=f"{preset.name}: {preset.description}",
        )


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Name or file of a preset.")],
    b: Annotated[str, typer.Argument(help="Name or file of another preset.")],
    as_json: JsonFlag = False,
) -> None:
    """Show the values that differ between two presets, and why."""
    from rtdetr_cli.config.presets import flatten, load_preset

    first, second = load_preset(a), load_preset(b)
    left, right = flatten(first), flatten(second)
    differing = {key: (left[key], right[key]) for key in left if left[key] != right[key]}
    if as_json:
        terminal.emit_json({"a": a, "b": b, "differences": differing})
        return
    texts = ("name", "description", "optim.why")
    terminal.table(("key", a, b), [(k, spell(x), spell(y)) for k, (x, y) in differing.items() if k not in texts])
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
