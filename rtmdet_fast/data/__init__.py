"""Data sets: annotation formats, decoding, augmentation, plans of what a run shows, drawn scenes, splitting."""
