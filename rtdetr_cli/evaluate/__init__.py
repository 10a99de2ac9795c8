"""Evaluation: COCO metrics, confidence intervals, score thresholds and error analysis."""
