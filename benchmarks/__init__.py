"""Measurements of speed and size: ratios, side by side in one process."""
