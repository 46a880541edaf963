"""Trained models for other runtimes, and these models as detectors."""
