"""What joins training, evaluation and export."""
