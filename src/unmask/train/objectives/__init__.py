"""Training objectives, one file each: the recipe section, and the loss as sums and counts of micro-batches."""
