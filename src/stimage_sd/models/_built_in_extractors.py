"""Extractors that the package brings: their networks, weights, normalizations and licenses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from stimage_sd.image.tissue_statistics import N_STATISTICS, tissue_statistics
from stimage_sd.models._extractor import Entry, Network, registered
from stimage_sd.models._foundation import FOUNDATION_MODELS, load_foundation
from stimage_sd.models._pretrained import load_densenet121, load_vision_transformer
from stimage_sd.models._weights import load_efficientnet_lite, load_resnet50
from stimage_sd.nn.densenet import DenseNet121
from stimage_sd.nn.efficientnet import (
    EMBEDDING_SIZE,
    N_STAGE_CHANNELS,
    SCALINGS,
    EfficientNetLite,
    StagesOfEfficientNetLite,
)
from stimage_sd.nn.resnet import ResNet50
from stimage_sd.nn.vision_transformer import SIZES, VisionTransformer

#: normalization of red, green and blue that torchvision's weights were trained with
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_EFFICIENTNETS = tuple(
    Entry(
        name=f"efficientnet_{scaling}",
        load=partial(load_efficientnet_lite, scaling=scaling),
        input_size=None,
        embedding_size=EMBEDDING_SIZE,
        # The TensorFlow models' normalization: (byte - 127) / 128.
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        license="Apache-2.0",
        token="built-in",
        is_recordable=True,
        architecture=partial(EfficientNetLite, SCALINGS[scaling]),
    )
    for scaling in SCALINGS
)
#: the stages of the network whose weights come with the installation, the default
_STAGES = replace(
    _EFFICIENTNETS[0],
    name="efficientnet_lite0_stages",
    load=partial(load_efficientnet_lite, scaling="lite0", network=StagesOfEfficientNetLite),
    embedding_size=N_STAGE_CHANNELS,
    architecture=partial(StagesOfEfficientNetLite, SCALINGS["lite0"]),
)
_NETWORKS = (
    *_EFFICIENTNETS,
    _STAGES,
    Entry(
        name="resnet50",
        load=load_resnet50,
        input_size=None,
        embedding_size=2048,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        license="BSD-3-Clause",
        token="built-in",
        is_recordable=True,
        architecture=ResNet50,
    ),
    Entry(
        name="densenet121",
        load=load_densenet121,
        input_size=None,
        embedding_size=1024,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        license="BSD-3-Clause",
        token="built-in",
        is_recordable=True,
        architecture=DenseNet121,
    ),
    # one network with two released sets of weights, trained with different normalizations
    Entry(
        name="vit_base_patch16_224",
        load=partial(load_vision_transformer, name="vit_base_patch16_224"),
        input_size=224,
        embedding_size=768,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        license="Apache-2.0",
        token="built-in",
        architecture=partial(VisionTransformer, SIZES["base"]),
    ),
    Entry(
        name="vit_b_16",
        load=partial(load_vision_transformer, name="vit_b_16"),
        input_size=224,
        embedding_size=768,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        license="BSD-3-Clause",
        token="built-in",
        architecture=partial(VisionTransformer, SIZES["base"]),
    ),
)
_FOUNDATION = tuple(
    Entry(
        name=name,
        load=partial(load_foundation, name),
        input_size=model.input_size,
        embedding_size=model.embedding_size,
        mean=model.normalization[0],
        std=model.normalization[1],
        license=model.license,
        token="built-in",
    )
    for name, model in FOUNDATION_MODELS.items()
)


def _load_tissue_statistics(weights: Path | None) -> tuple[Network, str]:
    return registered(weights, name="tissue_statistics", network=tissue_statistics, weights_hash="tissue-statistics-2")


#: extractors that are measured, not learned; raise the number in the hash when the definition changes
_CLASSICAL = (
    Entry(
        name="tissue_statistics",
        load=_load_tissue_statistics,
        input_size=None,
        embedding_size=N_STATISTICS,
        mean=None,
        std=None,
        license="",
        token="built-in",
    ),
)
#: all extractors that the package brings
BUILT_IN = (*_NETWORKS, *_FOUNDATION, *_CLASSICAL)
