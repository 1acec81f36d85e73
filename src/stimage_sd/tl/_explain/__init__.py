"""Explain predictions by the nuclei and pixels of a tile."""
