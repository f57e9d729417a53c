"""What whole-slide networks are compared with: classifiers of patch features."""
