"""Hidden aliases: names that ultralytics, rf-detr and the official scripts use for our commands and flags.

A flag is translated only if the command knows the new name and not the old one.
"""

from __future__ import annotations

from collections.abc import Collection

COMMAND_ALIASES = {"val": "eval", "evaluate": "eval", "detect": "predict", "fit": "train", "checks": "doctor"}

# foreign flag -> our words for it; () drops the flag and keeps its value, which is a positional argument here
FLAG_ALIASES: dict[str, tuple[str, ...]] = {
    "--amp": ("--precision", "auto"),
    "--batch-size": ("--batch",),
    "--checkpoint": ("--weights",),
    "--conf-thres": ("--conf",),
    "--confidence": ("--conf",),
    "--coco-path": ("--data",),
    "--dataset": ("--data",),
    "--dataset-dir": ("--data",),
    "--early-stopping-patience": ("--patience",),
    "--epoches": ("--epochs",),
    "--format": (),
    "--half": ("--fp16",),
    "--image-size": ("--imgsz",),
    "--img-size": ("--imgsz",),
    "--learning-rate": ("--lr",),
    "--lr0": ("--lr",),
    "--max-dets": ("--max-det",),
    "--model": ("--weights",),
    "--num-epochs": ("--epochs",),
    "--num-workers": ("--workers",),
    "--output": ("--out",),
    "--output-dir": ("--out",),
    "--project": ("--out",),
    "--pretrained-weights": ("--weights",),
    "--resolution": ("--imgsz",),
    "--save-dir": ("--out",),
    "--source": (),
    "--threshold": ("--conf",),
    "--tuning": ("--weights",),
    "--use-amp": ("--precision", "auto"),
}
# Commands with the model as positional argument: `--model x` means `x`.
MODEL_IS_POSITIONAL = frozenset({"eval", "export", "benchmark", "compare", "info", "finetune-discrete"})


def translate(command: str, arguments: list[str], known: Collection[str]) -> list[str]:
    """Replace foreign flag names by ours.

    Args:
        command: the command that will run.
        arguments: the words after `rtdetr`.
        known: the flags of the command.
    """
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
        elif dashed == "--source" and command != "predict":
            replacement = None
        elif dashed == "--format":
            if command == "export":
                result.extend(f"--{name}" for name in value.split(",")) if equals else result.append(word)
                continue
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
