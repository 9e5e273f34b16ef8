"""The kinds of data sets: one module for each, listed in `training.data.LOADERS`."""
