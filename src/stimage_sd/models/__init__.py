"""Fitted models, model files and the registry of extractors."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "_adapted": ["AdaptedModel"],
        "_baseline_model": ["BaselineModel"],
        "_cell_classifier": ["CellClassifier"],
        "_cellvit": ["CellViT", "load_cellvit"],
        "_certificate": ["Certificate"],
        "_combined": ["CombinedModel"],
        "_extractor": ["Extractor"],
        "_extractors": ["extractors", "get_extractor", "register_extractor"],
        "_finetuned": ["FinetunedModel"],
        "_gene_classifier": ["GeneClassifier"],
        "_instance_model": ["InstanceModel"],
        "_load": ["load"],
        "_nb": ["NBModel"],
        "_ready": ["pretrained"],
        "_recipe": ["Recipe", "SectionData", "TrainingSection"],
        "_wrapped": ["Wrapped", "WrappedModel", "wrap"],
    },
)
