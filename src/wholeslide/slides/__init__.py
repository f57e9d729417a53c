"""A slide file, read at the working resolution, cropped to its tissue, masked and augmented."""
