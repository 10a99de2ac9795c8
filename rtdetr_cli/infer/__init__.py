"""From images to detections, through one interface to every backend."""
