"""Backbones: image -> four levels of features at strides 4, 8, 16, 32, or fewer."""
