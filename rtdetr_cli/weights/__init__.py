"""Model files: headers, loading, published checkpoints and their cache, transfer between class lists."""
