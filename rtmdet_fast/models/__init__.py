"""Detectors: what all share, weight files, and a folder for each family."""
