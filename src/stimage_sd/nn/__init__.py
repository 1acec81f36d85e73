"""Pure networks and likelihoods: JAX and numpy in, JAX and numpy out, nothing of SpatialData."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "aggregation",
        "augmentation",
        "densenet",
        "efficientnet",
        "elastic_net",
        "expectation",
        "hist2st",
        "histogene",
        "intervals",
        "keypoints",
        "lattice",
        "layers",
        "mean_only",
        "negative_binomial",
        "negative_binomial_head",
        "nuclear_contrast",
        "onnx_graph",
        "parts",
        "patch_transformer",
        "patches",
        "permutation",
        "quality",
        "registration",
        "resnet",
        "ridge",
        "selective",
        "spatial",
        "stain",
        "tissue_statistics",
        "vision_transformer",
    ],
)
