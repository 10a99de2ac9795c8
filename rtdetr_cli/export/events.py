"""What an export reports while it works; the command line renders it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Notice:
    """A step that begins, or something that the user should know."""

    message: str


@dataclass(frozen=True, slots=True)
class ImageRun:
    """Verification has run a model on one more image."""


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """TensorRT has finished a step of a build phase."""

    phase: str
    done: int
    total: int
