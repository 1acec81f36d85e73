"""CellViT networks that find cells: CellViT itself, and HistoPLUS and NuLite of lazyslide-models.

They give the same three maps as HoVer-Net, so the same watershed finds the nuclei and the same scores apply. Torch is
imported when the first network is loaded.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from numpy.typing import NDArray

from stimage_sd._shown import Facts, counted, shown
from stimage_sd.image.hv_maps import hv_watershed
from stimage_sd.models._cell_classifier import NUCLEUS_UM
from stimage_sd.models._cellvit_network import network_of

#: border of a window that the network sees and that is discarded, px
_BORDER = 32
#: windows per run of the network
_BATCH = 4


class Family(NamedTuple):
    """Description of a CellViT network before its weights are read.

    - `classes`: types, without the background.
    - `tile_px`: side of the network's input in px, by micrometers per pixel.
    - `mean`, `std`: normalization, on the scale 0 to 1.
    - `maps`: names of the outputs: nuclear pixels, distances, types.
    - `page`: page of the weights, a repository on the Hugging Face hub or the address of the authors.
    - `files`: file of weights there, by micrometers per pixel.
    - `needs_access`: whether users must request access from the authors.
    - `backbone`: encoder of CellViT itself, whose checkpoints are not on the hub.
    """

    classes: tuple[str, ...]
    tile_px: dict[float, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    maps: tuple[str, str, str]
    page: str
    files: dict[float, str]
    needs_access: bool
    backbone: str | None = None


#: types of the data set PanNuke
_PANNUKE = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")

FAMILY = {
    "histoplus": Family(
        classes=(
            "cancer cell", "lymphocyte", "fibroblast", "plasmocyte", "eosinophil", "neutrophil", "macrophage",
            "muscle cell", "endothelial cell", "red blood cell", "epithelial", "apoptotic body", "mitotic figure",
            "minor stromal cell",
        ),
        tile_px={0.5: 224, 0.25: 448},
        mean=(0.707223, 0.578729, 0.703617),
        std=(0.211883, 0.230117, 0.177517),
        maps=("np", "hv", "tp"),
        page="Owkin-Bioptimus/histoplus",
        files={0.5: "histoplus_cellvit_segmentor_20x.pt", 0.25: "histoplus_cellvit_segmentor_40x.pt"},
        needs_access=True,
    ),
    "nulite": Family(
        classes=_PANNUKE,
        tile_px={0.5: 256, 0.25: 256},
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        maps=("nuclei_binary_map", "hv_map", "nuclei_type_map"),
        page="RendeiroLab/LazySlide-models",
        files=dict.fromkeys((0.5, 0.25), "NuLite/NuLite_H_exported.pt2"),
        needs_access=False,
    ),
    **{
        name: Family(
            classes=_PANNUKE, tile_px={0.5: 256, 0.25: 256}, mean=(0.5,) * 3, std=(0.5,) * 3,
            maps=("nuclei_binary_map", "hv_map", "nuclei_type_map"), page="https://github.com/TIO-IKIM/CellViT",
            files={0.5: f"CellViT-{file}-x20.pth", 0.25: f"CellViT-{file}-x40.pth"}, needs_access=False,
            backbone=backbone,
        )
        for name, file, backbone in (("cellvit_256", "256", "ViT-256"), ("cellvit_sam_h", "SAM-H", "SAM-H"))
    },
}  # fmt: skip


@shown
@dataclass(frozen=True, eq=False)
class CellViT:
    """A CellViT network that finds nuclei and their types, loaded by `load_cellvit`.

    Attributes
    ----------
    name
        Name of the network.
    classes
        Names of the types.
    mpp
        Micrometers per pixel of the images that the network takes.
    tile_px
        Side of the windows that the network runs on, px.
    key
        Identifier of the network and its weights.
    network
        The torch module.
    """

    name: str
    classes: tuple[str, ...]
    mpp: float
    tile_px: int
    key: str
    network: Callable[..., Any] = field(repr=False)

    @property
    def n_values(self) -> int:
        """Number of values per pixel: one probability per class."""
        return len(self.classes)

    def facts(self) -> Facts:
        """Names and values that describe the network, as notebooks show them."""
        return {
            "network": self.name,
            "types": counted(self.classes),
            "images": f"{self.mpp:g} µm per pixel, in windows of {self.tile_px} px",
        }

    def __call__(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Find the nuclei in images of any size.

        Parameters
        ----------
        images
            ``uint8 (batch, y, x, 3)``, at `mpp`.

        Returns
        -------
        Labels ``int32 (batch, y, x)``, 0 for no nucleus, and ``float32 (batch, y, x, n_classes)``: the probabilities of
        the classes without the background.

        Notes
        -----
        The network runs on overlapping windows, and the middle of each window is kept. The watershed runs on the
        complete maps, so there are no seams between windows.
        """
        labels, values = [], []
        for image in images:
            nuclear, hv, types = self.maps(image)
            labels.append(hv_watershed(nuclear, hv, nucleus_px=NUCLEUS_UM / self.mpp))
            values.append(np.moveaxis(types[1:], 0, -1))
        return np.stack(labels), np.stack(values)

    def maps(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Compute the maps of an image.

        Returns
        -------
        Probability that a pixel is nuclear ``(y, x)``, distances ``(2, y, x)``, probabilities of background and types
        ``(n_classes + 1, y, x)``.
        """
        height, width = image.shape[:2]
        core = self.tile_px - 2 * _BORDER
        rows, columns = -(-height // core), -(-width // core)
        padding = [(_BORDER, rows * core - height + _BORDER), (_BORDER, columns * core - width + _BORDER), (0, 0)]
        padded = np.pad(image, padding, mode="symmetric")
        corners = [(row * core, column * core) for row in range(rows) for column in range(columns)]
        whole = np.empty((5 + len(self.classes), rows * core, columns * core), np.float32)
        for start in range(0, len(corners), _BATCH):
            part = corners[start : start + _BATCH]
            windows = np.stack([padded[top : top + self.tile_px, left : left + self.tile_px] for top, left in part])
            for (top, left), window in zip(part, self._run(windows), strict=True):
                whole[:, top : top + core, left : left + core] = window[:, _BORDER:-_BORDER, _BORDER:-_BORDER]
        whole = whole[:, :height, :width]
        nuclear = scipy.special.expit(whole[1] - whole[0])
        return nuclear, whole[2:4], scipy.special.softmax(whole[4:], axis=0)

    def _run(self, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return logits and distances, ``(batch, maps, y, x)``."""
        import torch

        family = FAMILY[self.name]
        mean, std = (np.asarray(of, np.float32) for of in (family.mean, family.std))
        scaled = ((windows / np.float32(255) - mean) / std).astype(np.float32)
        with _LOCK, torch.inference_mode():  # the network uses all cores
            outputs = self.network(torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))))
        # HistoPLUS returns the maps together with the last layer's tokens
        maps = outputs[0] if isinstance(outputs, tuple) else outputs
        return np.concatenate([maps[name].float().cpu().numpy() for name in family.maps], axis=1)


_LOCK = threading.Lock()


def load_cellvit(name: str, *, weights: str | Path | None = None, mpp: float = 0.5) -> CellViT:
    """Load a CellViT network (extra ``foundation``).

    Parameters
    ----------
    name
        ``"cellvit_sam_h"`` or ``"cellvit_256"``: CellViT itself, on the encoder of SAM-H or on ViT-256 (PanNuke's five
        types). Or ``"histoplus"`` (14 types) or ``"nulite"`` (PanNuke's five).
    weights
        A local file: the authors' checkpoint of CellViT, the state dict of HistoPLUS in torch's format, or the
        `torch.export` program of NuLite. By default the weights come from the Hugging Face hub. CellViT's are not on
        it: download them from the authors' page.
    mpp
        Micrometers per pixel that the network was trained at: 0.5 or 0.25. CellViT's files ``x20`` and ``x40``.

    Returns
    -------
    The network, which `stimage_sd.tl.predict_cells` takes in place of a fitted model.

    Raises
    ------
    ModuleNotFoundError
        If the extra is not installed.
    FileNotFoundError
        If `weights` is not a file, or the download from the hub fails.
    ValueError
        If the name or the resolution is unknown, or the file belongs to another network.

    Examples
    --------
    >>> load_cellvit("cellvit")
    Traceback (most recent call last):
    ValueError: Expected `name` to be one of ['cellvit_256', 'cellvit_sam_h', 'histoplus', 'nulite'], found 'cellvit'.
    """
    if name not in FAMILY:
        raise ValueError(f"Expected `name` to be one of {sorted(FAMILY)}, found {name!r}.")
    family = FAMILY[name]
    if mpp not in family.tile_px:
        raise ValueError(f"Expected `mpp` to be one of {sorted(family.tile_px)}, found {mpp}.")
    try:
        import torch
        from lazyslide_models.segmentation.cellvit_family import histoplus
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'Found no {error.name}, which {name!r} needs. Install it with `pip install "stimage-sd[foundation]"`.'
        ) from error
    path = Path(weights).expanduser() if weights is not None else _from_hub(family, mpp)
    if not path.is_file():
        raise FileNotFoundError(f"Found no file of the weights of {name!r} at {str(path)!r}.")
    network: Any
    try:
        if family.backbone is not None:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            n_types = len(family.classes) + 1
            network = network_of(checkpoint, family.backbone, n_types=n_types, tile_px=family.tile_px[mpp])
        elif name == "nulite":
            network = torch.export.load(path).module()
        else:
            network = histoplus.HistoPLUSModel(backbone_tile_size=family.tile_px[mpp])
            state = torch.load(path, map_location="cpu", weights_only=True)
            network.load_state_dict(histoplus.remap_state_dict(state))
            network.eval()
    except Exception as error:
        raise ValueError(f"{path} holds no weights of {name!r} ({error}).") from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return CellViT(name, family.classes, mpp, family.tile_px[mpp], f"{name}-{digest}-{mpp:g}", network)


def _from_hub(family: Family, mpp: float) -> Path:
    if family.backbone is not None:
        raise FileNotFoundError(
            f"The weights {family.files[mpp]} are not on a hub. Download them from {family.page} and pass their path "
            "as `weights=`."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(family.page, family.files[mpp]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        page = f"https://huggingface.co/{family.page}"
        ask = f"Ask for access at {page} and log in with `hf auth login`, or" if family.needs_access else "Or"
        raise FileNotFoundError(
            f"Found no {family.files[mpp]} on the hub ({type(error).__name__}). {ask} download it from {page} and pass "
            "its path as `weights=`."
        ) from error
