"""Pathology foundation models: their settings, and loading them from a local file or from the Hugging Face hub.

The networks are torch modules of timm, transformers and lazyslide-models (extra ``foundation``). These packages are
imported when the first such extractor is loaded.
"""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stimage_sd.models._weights import sha256_of_arrays

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class Transformer:
    """A vision transformer of timm.

    - `options`: options of `timm.models.VisionTransformer`, without width, depth and heads. These follow from the
      weights.
    - `head_width`: width of an attention head.
    - `gated`: whether the blocks have gated feed-forward layers (SwiGLU, packed).
    """

    options: Mapping[str, Any]
    head_width: int = 64
    gated: bool = True


@dataclass(frozen=True)
class FoundationModel:
    """Settings of a foundation model, known before its weights are read.

    - `key`: name in lazyslide-models.
    - `page`: web page with the weights and their terms.
    - `license`: terms of use of the weights.
    - `needs_access`: whether users must request access from the authors.
    - `kind`: format of local weights. ``"timm"``: a state dict (safetensors, or torch's format). ``"transformers"``: a
      folder with ``config.json`` and weights. ``"exported"``: a program of `torch.export`. ``"conch"``: a checkpoint of
      the package conch.
    - `embedding_size`, `input_size`: length of an embedding, and side of the input tiles in px.
    - `crop`: side of the central part of a tile that the network sees, px.
    - `pooling`: ``"class"``: the class token. ``"class and mean"``: the class token and the mean of the patch tokens.
    """

    key: str
    page: str
    license: str
    embedding_size: int
    kind: Literal["timm", "transformers", "exported", "conch"] = "timm"
    needs_access: bool = True
    input_size: int = 224
    crop: int = 224
    normalization: Normalization = IMAGENET
    pooling: Literal["class", "class and mean"] = "class"
    network: Transformer | None = field(default=None, repr=False)


_GIANT = {"patch_size": 14, "mlp_ratio": 2.66667 * 2, "init_values": 1e-5}
_HUGE = {"patch_size": 14, "mlp_ratio": 5.3375, "init_values": 1e-5, "global_pool": ""}

FOUNDATION_MODELS: dict[str, FoundationModel] = {
    "gigapath": FoundationModel(
        key="gigapath", page="https://huggingface.co/prov-gigapath/prov-gigapath", embedding_size=1536,
        license="Apache-2.0, research use", input_size=256,
        network=Transformer({**_GIANT, "patch_size": 16, "mlp_ratio": 5.33334}),
    ),
    "h_optimus_0": FoundationModel(
        key="h-optimus-0", page="https://huggingface.co/bioptimus/H-optimus-0", embedding_size=1536,
        license="Apache-2.0", normalization=OPTIMUS,
        network=Transformer({**_GIANT, "reg_tokens": 4, "no_embed_class": True}),
    ),
    "h_optimus_1": FoundationModel(
        key="h-optimus-1", page="https://huggingface.co/bioptimus/H-optimus-1", embedding_size=1536,
        license="CC-BY-NC-ND-4.0", normalization=OPTIMUS,
        network=Transformer({**_GIANT, "reg_tokens": 4, "no_embed_class": True}),
    ),
    "phikon": FoundationModel(
        key="phikon", page="https://huggingface.co/owkin/phikon", embedding_size=768,
        license="Owkin non-commercial", kind="transformers", needs_access=False,
    ),
    "phikon_v2": FoundationModel(
        key="phikonv2", page="https://huggingface.co/owkin/phikon-v2", embedding_size=1024,
        license="Owkin non-commercial", kind="transformers", needs_access=False,
    ),
    "ctranspath": FoundationModel(
        key="ctranspath", page="https://github.com/Xiyue-Wang/TransPath", embedding_size=768,
        license="GPL-3.0", kind="exported", needs_access=False,
    ),
    "conch": FoundationModel(
        key="conch", page="https://huggingface.co/MahmoodLab/conch", embedding_size=512,
        license="CC-BY-NC-ND-4.0", kind="conch", input_size=448, crop=448, normalization=CLIP,
    ),
    "uni": FoundationModel(
        key="uni", page="https://huggingface.co/MahmoodLab/UNI", embedding_size=1024, license="CC-BY-NC-ND-4.0",
        network=Transformer({"patch_size": 16, "init_values": 1e-5, "dynamic_img_size": True}, gated=False),
    ),
    "uni2": FoundationModel(
        key="uni2", page="https://huggingface.co/MahmoodLab/UNI2-h", embedding_size=1536, license="CC-BY-NC-ND-4.0",
        network=Transformer({**_GIANT, "reg_tokens": 8, "no_embed_class": True, "dynamic_img_size": True}),
    ),
    "virchow": FoundationModel(
        key="virchow", page="https://huggingface.co/paige-ai/Virchow", embedding_size=2560, license="Apache-2.0",
        pooling="class and mean", network=Transformer(_HUGE, head_width=80),
    ),
    "virchow2": FoundationModel(
        key="virchow2", page="https://huggingface.co/paige-ai/Virchow2", embedding_size=2560,
        license="CC-BY-NC-ND-4.0", pooling="class and mean",
        network=Transformer({**_HUGE, "reg_tokens": 4}, head_width=80),
    ),
}  # fmt: skip


class TorchNetwork:
    """A torch module as a numpy function from normalized tiles ``(n, y, x, 3)`` to embeddings.

    The module runs on a GPU if there is one. It computes one batch at a time on all cores, and the threads that cut
    tiles wait for their turn.
    """

    def __init__(self, forward: Callable[[Any], Any], module: Any, *, crop: int) -> None:
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if hasattr(module, "to"):
            module.to(self._device)
        self._forward, self._crop, self._lock = forward, crop, threading.Lock()

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        """Embed normalized tiles."""
        import torch

        top, left = ((side - self._crop) // 2 for side in tiles.shape[1:3])
        middle = tiles[:, top : top + self._crop, left : left + self._crop]
        channels_first = np.ascontiguousarray(np.moveaxis(middle, -1, 1))
        with self._lock, torch.inference_mode():
            embedded = self._forward(torch.from_numpy(channels_first).to(self._device))
            return embedded.float().cpu().numpy()


def load_foundation(name: str, weights: Path | None) -> tuple[TorchNetwork, str]:
    """Load a foundation model from a local file or folder, or from the Hugging Face hub.

    - `name`: name in `FOUNDATION_MODELS`.
    - `weights`: a local file or folder in the format of `FoundationModel.kind`. `None`: the Hugging Face hub or its
      local cache.
    - returns: the network and a hash of its weights.
    """
    model = FOUNDATION_MODELS[name]
    try:
        import lazyslide_models  # noqa: F401
        import timm  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"The extractor {name!r} runs on torch, timm and lazyslide-models, which are not installed "
            f'({error}). Run `pip install "stimage-sd[foundation]"`.'
        ) from error
    if weights is not None and not weights.exists():
        raise FileNotFoundError(f"No weights of {name!r} at {weights}. Get them from {model.page}.")
    module, forward = _from_hub(name, model) if weights is None else _from_disk(name, model, weights)
    return TorchNetwork(forward, module, crop=model.crop), _hash(module)


# --------------------------------------------------------------------------------------------------
# weights from the Hugging Face hub


def _from_hub(name: str, model: FoundationModel) -> tuple[Any, Callable[[Any], Any]]:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from lazyslide_models import MODEL_REGISTRY

    local = f'or pass a local copy: `get_extractor("{name}", weights=...)`'
    try:
        built = MODEL_REGISTRY[model.key]()
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise PermissionError(
            f"The weights of {name!r} require access ({model.license}). Request it at {model.page} and log in with "
            f"`hf auth login`, {local}."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"The weights of {name!r} are not in the cache of the Hugging Face hub, and the download failed "
            f"({reason}). Download them from {model.page}, {local}."
        ) from error
    module = built.model
    if model.kind == "transformers":
        return module.eval(), _class_token_of_transformers(module)
    if model.kind == "timm":
        return module.eval(), _pooled(module, model.pooling)
    return module, built.encode_image


# --------------------------------------------------------------------------------------------------
# weights from disk


def _from_disk(name: str, model: FoundationModel, weights: Path) -> tuple[Any, Callable[[Any], Any]]:
    if model.kind == "timm":
        module = build_transformer(model, _state(weights), where=f"{name!r} at {weights}")
        return module, _pooled(module, model.pooling)
    if model.kind == "transformers":
        return _from_folder(name, model, weights)
    if model.kind == "exported":
        import torch

        try:
            module = torch.export.load(str(weights)).module()
        except (RuntimeError, ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"Expected a program of torch.export at {weights}, as lazyslide-models' hub folder has {name!r}, "
                f"found something else ({' '.join(str(error).split())[:200]})."
            ) from error
        return module, module
    from lazyslide_models import MODEL_REGISTRY

    built = MODEL_REGISTRY[model.key](model_path=str(weights))
    return built.model, built.encode_image


def build_transformer(model: FoundationModel, state: Mapping[str, Any], *, where: str) -> Any:
    """Build timm's vision transformer for a state dict, and fill it.

    - `model`: settings of the foundation model.
    - `state`: tensors by their names in timm.
    - `where`: description of the model and its weights for error messages.
    - returns: the module, in evaluation mode.
    """
    import torch
    from timm.layers import SwiGLUPacked
    from timm.models import VisionTransformer

    network = model.network
    if network is None:
        raise TypeError(f"{where} is no vision transformer of timm.")
    blocks = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    if "cls_token" not in state or not blocks:
        raise ValueError(f"Expected the weights of {where}, found {sorted(state)[:5]} and others. {model.page}")
    width = int(state["cls_token"].shape[-1])
    layers = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU} if network.gated else {}
    module = VisionTransformer(
        img_size=model.crop, num_classes=0, embed_dim=width, depth=max(blocks) + 1,
        num_heads=max(1, width // network.head_width), **layers, **network.options,
    )  # fmt: skip
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"The weights of {where} are of another network: {' '.join(str(error).split())[:400]}"
        ) from error
    size = width * (2 if model.pooling == "class and mean" else 1)
    if size != model.embedding_size:
        raise ValueError(f"The weights of {where} give embeddings of {size}, expected {model.embedding_size}.")
    return module.eval()


def _state(path: Path) -> dict[str, Any]:
    """Read a state dict without running code from the file."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, KeyError, _unpickling_error()) as error:
        raise ValueError(
            f"Expected a file of weights at {path}, safetensors or torch's format, found that it cannot be read "
            f"({' '.join(str(error).split())[:200]})."
        ) from error
    arrays = state.get("state_dict", state) if isinstance(state, dict) else {}
    return {str(key).removeprefix("module."): value for key, value in arrays.items()}


def _unpickling_error() -> type[Exception]:
    import pickle  # torch raises this error if a file holds more than tensors

    return pickle.UnpicklingError


def _from_folder(name: str, model: FoundationModel, folder: Path) -> tuple[Any, Callable[[Any], Any]]:
    from safetensors import SafetensorError
    from transformers import AutoConfig, Dinov2Model, ViTModel

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"Expected the folder of {name!r} with `config.json` and `model.safetensors` at {folder}, found none of "
            f"them. Fetch it whole from {model.page}."
        )
    classes = {"vit": ViTModel, "dinov2": Dinov2Model}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type not in classes:
            raise ValueError(f"its config is of a {config.model_type!r}")
        options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        module = classes[config.model_type].from_pretrained(
            folder, config=config, local_files_only=True, use_safetensors=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"The weights of {name!r} in {folder} cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error
    if config.hidden_size != model.embedding_size:
        raise ValueError(
            f"The weights of {name!r} in {folder} give embeddings of {config.hidden_size}, expected "
            f"{model.embedding_size}."
        )
    return module.eval(), _class_token_of_transformers(module)


# --------------------------------------------------------------------------------------------------
# from tokens to an embedding


def _class_token_of_transformers(module: Any) -> Callable[[Any], Any]:
    return lambda tiles: module(pixel_values=tiles).last_hidden_state[:, 0]


def _pooled(module: Any, pooling: str) -> Callable[[Any], Any]:
    import torch

    def forward(tiles: Any) -> Any:
        tokens = module.forward_features(tiles)
        if pooling == "class":
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, module.num_prefix_tokens :].mean(dim=1)], dim=-1)

    return forward


def _hash(module: Any) -> str:
    return sha256_of_arrays(
        {name: tensor.detach().float().cpu().numpy() for name, tensor in module.state_dict().items()}
    )
