"""A backbone cut into local stages, their classifiers and their feature reconstruction."""
