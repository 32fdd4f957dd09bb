"""Pictures of a run as inline SVG and HTML: charts, images with boxes, correspondences, features."""
