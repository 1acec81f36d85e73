"""Figures. Each function draws one kind and returns matplotlib axes. No function calls `show`."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_calibration": ["calibration"],
        "_cell_scores": ["cell_scores", "confusion"],
        "_cells": ["cells"],
        "_enrichment": ["enrichment"],
        "_explanation": ["explanation", "explanation_scores"],
        "_latent": ["latent"],
        "_prediction": ["prediction"],
        "_roc": ["roc"],
        "_saliency": ["saliency"],
        "_scores": ["scores"],
        "_survival": ["survival"],
        "_tiles": ["tiles"],
        "_training": ["training"],
        "_uncertainty": ["uncertainty"],
    },
)
