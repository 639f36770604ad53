"""From a detector's raw outputs to detections in the image's pixels: decode, suppression, mapping back, tiles."""
