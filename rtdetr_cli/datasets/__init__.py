"""Datasets: one file per format, and the frozen arrays that they are read into."""
