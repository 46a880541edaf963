"""Rotated boxes, masks as pixels and windows over images: NumPy, without models or files."""
