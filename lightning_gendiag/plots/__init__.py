"""Pictures for the loggers, as uint8 arrays (H, W, 3) drawn with Pillow: panels, charts and images."""
