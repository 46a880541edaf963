"""From an image to its network input, and from what a head found to results and pictures."""
