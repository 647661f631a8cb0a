"""Images on disk, their augmentation, and the order in which they are read."""
