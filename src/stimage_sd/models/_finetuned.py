"""Networks fine-tuned together with negative binomial heads, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from flax import nnx
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._shown import Facts, counted, shown
from stimage_sd.models._certificate import Certified
from stimage_sd.models._extractor import Extractor
from stimage_sd.models._extractors import blank_module, derived_extractor, settings
from stimage_sd.models._facts import certificate_facts, interval_facts, tile_facts, training_facts
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._files import SavedModel, under
from stimage_sd.models._members import Members
from stimage_sd.models._nb import HeadName, NBModel, NBSection
from stimage_sd.models._network_arrays import network_arrays, put_arrays
from stimage_sd.models._specification import TileSpecification, check_specification
from stimage_sd.models._stand_ins import Embedded, MixtureStandIns
from stimage_sd.models._weights import sha256_of_arrays
from stimage_sd.stream.driver import run_over_tiles

_PREFIX = "network/"


@shown
@dataclass(frozen=True, eq=False)
class FinetunedModel(Certified, SavedModel, kind="finetuned"):
    """A network and a head that predict a negative binomial for every gene from a tile's pixels.

    Made by `stimage_sd.tl.finetune_nb`, loaded by `stimage_sd.models.load`. Sections need no embeddings. In
    `tl.predict`, the model embeds the tiles with its own network.

    Attributes
    ----------
    genes
        Names of the genes, in the order of every array's last axis.
    tiles
        Tiling that a section must have. `extractor` and `weights_hash` name the network before fine-tuning.
    features
        Space from the network's features to the head's inputs.
    head
        ``"paper"`` or ``"dispersion"``.
    parameters
        The head's arrays. The first axis has one member.
    floor
        ``float32 (2, n_genes)``: mean and dispersion (r) of the mean-only fit to the training counts.
    network
        The network with fine-tuned weights.
    total
        Median total count of the training tiles, which has depth 1; `None` if sections and spots have no depth.
    interval_level
        Nominal level at which the central intervals covered 90 % of held-out counts.
    training
        Record of the fit: sections, validation, seed, options, package versions, history.
    shifts
        Standard deviation of each gene's shift, as in `stimage_sd.models.NBModel`.
    r_scale, spot_sd
        Factor on r, and standard deviation of what all genes of a spot share, as in `stimage_sd.models.NBModel`.
    """

    genes: tuple[str, ...]
    tiles: TileSpecification
    features: FeatureSpace
    head: HeadName
    parameters: Mapping[str, np.ndarray]
    floor: np.ndarray
    network: nnx.Module = field(repr=False)
    total: float | None = None
    interval_level: float = 0.9
    training: dict[str, Any] = field(default_factory=dict)
    shifts: np.ndarray | None = None
    r_scale: float = 1.0
    spot_sd: float = 0.0

    @property
    def embeddings(self) -> tuple[TileSpecification, ...]:
        """Embeddings that a section must have: none, because the model embeds tiles itself."""
        return ()

    @cached_property
    def extractor(self) -> Extractor:
        """The network as an extractor for `stimage_sd.pp.embed`. Its name ends in the start of its weights' hash."""
        weights_hash = sha256_of_arrays(network_arrays(self.network))
        return derived_extractor(self.tiles.extractor, self.network, weights_hash=weights_hash)

    @property
    def history(self) -> pd.DataFrame:
        """Losses, one row per epoch: epoch, member, training_nll and validation_nll. Epoch 0 is before training."""
        return pd.DataFrame(self.training["history"])

    @property
    def members(self) -> Members[FinetunedModel]:
        """The one member, which is the model itself."""
        return Members(1, lambda _: self)

    @property
    def member_weights(self) -> np.ndarray:
        """Weight of the one member, ``float64 (1,)``."""
        return np.ones(1)

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model, stored with its predictions."""
        unfrozen = self.training.get("options", {}).get("unfreeze")
        return {
            "extractor": self.extractor.name,
            "head": self.head,
            "n_members": 1,
            "fine_tuned": "head alone" if unfrozen is None else str(unfrozen),
        }

    def open(self, sdata: SpatialData, *, section: str) -> NBSection:
        """Check that a section's tiles match the model, and compute their features from the pixels.

        Parameters
        ----------
        sdata
            The section.
        section
            Name of the section, for error messages.

        Returns
        -------
        The opened section. Its `r_and_p` gives the predictions.

        Raises
        ------
        KeyError
            If the section was not tiled.
        ValueError
            If tiles or staining differ from the model's. The error names the step to run again.
        """
        values = self._embeddings(sdata, section)
        scale = self.features.scale(values, section=section)
        return NBSection(self._heads(), self.features.reduce(values, scale), self.features.strangeness(values))

    def stand_ins(self, sdata: SpatialData, *, section: str) -> MixtureStandIns:
        """Open a section, as `open` does, so that other tiles can replace one of its tiles."""
        values = self._embeddings(sdata, section)
        image, none = contract.working_image_name(sdata), np.zeros((len(values), 0), np.float32)
        return self._heads().stand_ins_of((Embedded(self.tiles, image, values, none, self.extractor),))

    def _embeddings(self, sdata: SpatialData, section: str) -> np.ndarray:
        """Check the section and embed its kept tiles, ``float32 (n_tiles, n_features)``."""
        expected = self.tiles
        check_specification(
            tile_specification(
                sdata, extractor=expected.extractor, weights_hash=expected.weights_hash, input_px=expected.input_px
            ),
            expected,
            section=section,
        )
        table = contract.tiles(sdata)
        image = contract.working_image_name(sdata)
        centers, side = contract.tile_geometry(sdata, table[table.obs["keep"].to_numpy()], image)
        return run_over_tiles(
            contract.levels(sdata, image),
            centers,
            self.extractor,
            sides=[side],
            target=expected.input_px,
            key=f"{self.extractor.name}-{self.extractor.weights_hash}",
            description=f"{contract.sample(sdata)}: {self.extractor.name}",
        )[:, 0]

    def _heads(self) -> NBModel:
        shared = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "network"}
        return NBModel(**shared)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the config and arrays that the model is saved as."""
        config, arrays = self._heads().to_parts()
        config["network"] = {"extractor": self.tiles.extractor, **_plain(settings(self.tiles.extractor))}
        weights = {_PREFIX + name: array for name, array in network_arrays(self.network).items()}
        return config, {**arrays, **weights}

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> FinetunedModel:
        """Build a model from what `to_parts` returned. The registry gives the network's class by name."""
        described = dict(config["network"])
        name = described.pop("extractor")
        network = blank_module(name)
        here = _plain(settings(name))
        if described != here:
            raise ValueError(
                f"The model's network is that of the extractor {name!r} with {described}, but the one registered here "
                f"has {here}. Register the one that the model was trained with."
            )
        put_arrays(network, under(_PREFIX, arrays), name=name)
        heads = NBModel.from_parts(config, {key: array for key, array in arrays.items() if key.count("/") == 0})
        return cls.of(heads, network)

    @classmethod
    def of(cls, heads: NBModel, network: nnx.Module) -> FinetunedModel:
        """Build a model from its heads and its network."""
        shared = (item.name for item in fields(cls) if item.name != "network")
        return cls(network=network, **{name: getattr(heads, name) for name in shared})

    def facts(self) -> Facts:
        """Names and values that describe the model, as notebooks show them."""
        return {
            "genes": counted(self.genes),
            "network": f"{self.tiles.extractor} at {self.tiles.input_px} px, fine-tuned: "
            f"{self.description['fine_tuned']}",
            "head": self.head,
            **tile_facts(self.tiles, standardize=self.features.standardize),
            **interval_facts(self.interval_level),
            **certificate_facts(self),
            **training_facts(self.training),
        }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn tuples into lists, as JSON does."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def tile_specification(sdata: SpatialData, *, extractor: str, weights_hash: str, input_px: int) -> TileSpecification:
    """Read a section's tiling, for a model that embeds tiles itself."""
    tiling, about = contract.tiling(sdata), contract.info(sdata)
    normalized = about.get("normalized_image")
    is_normalized = normalized is not None and normalized == contract.working_image_name(sdata)
    return replace(
        TileSpecification(
            extractor=extractor,
            weights_hash=weights_hash,
            fields_of_view=(1.0,),
            context_rings=0,
            input_px=input_px,
            side_px=float(tiling["side_px"]),
            size_um=float(tiling["size_um"]) if "size_um" in tiling else None,
        ),
        stain=about["stain"] if is_normalized else None,
    )
