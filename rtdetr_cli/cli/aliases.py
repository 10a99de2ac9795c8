"""Hidden aliases: names that ultralytics, rf-detr and the official scripts use for our commands and flags.

A flag is translated only if the command knows the new name and not the old one.
"""

from __future__ import annotations

from collections.abc import Collection

COMMAND_ALIASES = {"val": "eval", "evaluate": "eval", "detect": "predict", "fit": "train", "checks": "doctor"}

# foreign flag -> our words for it; () drops the flag and keeps its value, which is a positional argument here
FLAG_ALIASES: dict[str, tuple[str, ...]] = {
    "--amp": ("--precision", "auto"),
    "--use-amp": ("--precision", "auto"),
    "--batch-size": ("--batch",),
    "--early-stopping-patience": ("--patience",),
    "--half": ("--fp16",),
    "--max-dets": ("--max-det",),
    "--num-workers": ("--workers",),
    "--format": (),
    "--source": (),
    **dict.fromkeys(("--checkpoint", "--model", "--pretrained-weights", "--tuning"), ("--weights",)),
    **dict.fromkeys(("--conf-thres", "--confidence", "--threshold"), ("--conf",)),
    **dict.fromkeys(("--coco-path", "--dataset", "--dataset-dir"), ("--data",)),
    **dict.fromkeys(("--epoches", "--num-epochs"), ("--epochs",)),
    **dict.fromkeys(("--image-size", "--img-size", "--resolution"), ("--imgsz",)),
    **dict.fromkeys(("--learning-rate", "--lr0"), ("--lr",)),
    **dict.fromkeys(("--output", "--output-dir", "--project", "--save-dir"), ("--out",)),
}
# Commands with the model as positional argument: `--model x` means `x`.
MODEL_IS_POSITIONAL = frozenset({"eval", "export", "benchmark", "compare", "info", "finetune-discrete"})


def translate(command: str, arguments: list[str], known: Collection[str]) -> list[str]:
    """Replace foreign flag names in the words after `rtdetr` with ours; `known` are the flags of the command."""
    result: list[str] = []
    literal = False
    for word in arguments:
        literal = literal or word == "--"
        flag, equals, value = word.partition("=")
        if literal or not flag.startswith("--") or flag in known:
            result.append(word)
            continue
        dashed = flag.replace("_", "-")
        replacement = (dashed,) if dashed in known else FLAG_ALIASES.get(dashed)
        if dashed in ("--model", "--checkpoint", "--weights") and command in MODEL_IS_POSITIONAL:
            replacement = ()
        elif dashed == "--format" and command == "export" and equals:
            result.extend(f"--{name}" for name in value.split(","))
            continue
        elif dashed == "--format" or (dashed == "--source" and command != "predict"):
            replacement = None
        if replacement is None or any(r.startswith("--") and r not in known for r in replacement):
            result.append(word)
        elif not equals:
            result.extend(replacement)
        elif len(replacement) == 1:
            result.append(f"{replacement[0]}={value}")
        else:
            result.extend(replacement or (value,))
    return result
