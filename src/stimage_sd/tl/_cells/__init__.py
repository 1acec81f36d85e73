"""Fit, predict and score cell types."""
