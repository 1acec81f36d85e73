"""Pure networks and likelihoods: JAX and numpy in, JAX and numpy out, nothing of SpatialData."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "aggregation",
        "augmentation",
        "capsules",
        "densenet",
        "efficientnet",
        "elastic_net",
        "expectation",
        "graph_attention",
        "hist2st",
        "histogene",
        "igidl",
        "intervals",
        "keypoints",
        "lattice",
        "layers",
        "lime",
        "mean_only",
        "negative_binomial",
        "negative_binomial_head",
        "nuclear_contrast",
        "nuclei_graph",
        "onnx_graph",
        "parts",
        "patch_transformer",
        "patches",
        "permutation",
        "quality",
        "registration",
        "resnet",
        "ridge",
        "saliency",
        "selective",
        "spatial",
        "stain",
        "thitogene",
        "tissue_statistics",
        "vision_transformer",
    ],
)
