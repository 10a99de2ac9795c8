"""rtdetr-cli: finetune RT-DETRv2 on your own pictures, and deploy it."""

from __future__ import annotations

__version__ = "0.1.0"
