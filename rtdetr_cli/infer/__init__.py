"""From pictures to detections, through one interface to every backend."""
