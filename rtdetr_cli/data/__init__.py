"""From pictures and labels on disk to batches, and the doctor that checks them."""
