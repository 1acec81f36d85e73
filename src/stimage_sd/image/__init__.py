"""Stain, quality, registration, nuclei and segmentation scores on plain arrays without SpatialData."""
