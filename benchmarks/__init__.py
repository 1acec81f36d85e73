"""Measurements of the package, side by side with its peers."""
