"""Datasets, transforms and the loader: everything between files and batches, on the host."""
