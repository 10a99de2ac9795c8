"""RT-DETRv2, and the files that hold it."""
