"""Training batches: the loader, its workers and its cache."""
