"""Preprocessing: tissue, stain, tiles, embeddings and genes. Each step has its own file."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_aggregate": ["aggregate"],
        "_annotate_cells": ["annotate_cells"],
        "_augment": ["augment"],
        "_context": ["spatial_context"],
        "_embed": ["embed"],
        "_genes": ["select_genes"],
        "_label_by_annotations": ["label_by_annotations"],
        "_prepare": ["prepare"],
        "_register": ["Registration", "register"],
        "_segment_nuclei": ["segment_nuclei"],
        "_slide_qc": ["slide_qc"],
        "_stain": ["StainReference", "stain_normalize"],
        "_tile": ["tile"],
        "_tissue": ["tissue_mask"],
    },
)
