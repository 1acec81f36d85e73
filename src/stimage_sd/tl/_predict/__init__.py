"""Predict expression of tiles, and calibrate, combine and cluster predictions."""
