"""What is wrong with a dataset: checks, report, page, repair, new splits."""
