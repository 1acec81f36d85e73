"""Fit models to sections."""
