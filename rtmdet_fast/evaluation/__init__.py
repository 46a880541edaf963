"""A model against ground truth: COCO's and DOTA's figures, and the report of a run."""
