"""Model files: our own, published checkpoints, the download cache, transfer between class lists."""
