"""A model made ready to run, on one image, a batch or a stream."""
