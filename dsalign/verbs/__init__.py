"""The commands of dsalign: train, and data with its report."""
