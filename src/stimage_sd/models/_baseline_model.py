"""Fitted baselines and their files: a recipe, its learned arrays and one dispersion per gene."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd._shown import Facts, counted, shown
from stimage_sd.models._certificate import Certified
from stimage_sd.models._facts import certificate_facts, interval_facts, tile_facts, training_facts
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._files import SavedModel, under
from stimage_sd.models._members import Members
from stimage_sd.models._recipe import Recipe, SectionData, options, recipes
from stimage_sd.models._specification import TileSpecification, check_specification, features, specification
from stimage_sd.stream.driver import run_over_tiles

#: British names in files of earlier versions
_OLD_NAMES = {"learnt.": "learned.", "space.centre": "space.center", "normalisation": "normalization"}


@shown
@dataclass(frozen=True)
class BaselineModel(Certified, SavedModel, kind="baseline"):
    """A negative binomial model with one mean per gene and tile, and one dispersion per gene.

    Made by `stimage_sd.tl.fit_baseline`, loaded by `stimage_sd.models.load`.

    Attributes
    ----------
    genes
        Names of the genes, in the order of every array's last axis.
    recipe
        The hyperparameters, an instance of a recipe of `stimage_sd.baselines`.
    tiles
        Tiling and embedding that a section must have, for each extractor.
    learned
        The recipe's arrays.
    scale
        ``float32 (n_genes,)``: factor on the recipe's means that makes them agree with counts of left-out tiles.
    dispersion
        ``float32 (n_genes,)``: r of highest likelihood for the counts of left-out tiles.
    familiarity
        Space of the training embeddings, from which strangeness is computed.
    floor
        ``float32 (2, n_genes)``: mean and dispersion (r) of the mean-only fit to the training counts.
    total
        Median total count of the training tiles, which has size factor 1, if the recipe's target is ``"lognorm"``.
    interval_level
        Nominal level at which central intervals covered 90 % of left-out counts.
    training
        Record of the fit: sections, seed, package version.
    """

    genes: tuple[str, ...]
    recipe: Recipe
    tiles: tuple[TileSpecification, ...]
    learned: Mapping[str, np.ndarray]
    scale: np.ndarray
    dispersion: np.ndarray
    familiarity: FeatureSpace
    floor: np.ndarray
    total: float | None = None
    interval_level: float = 0.9
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def members(self) -> Members[BaselineModel]:
        """The one member, which is the model itself."""
        return Members(1, lambda _: self)

    @property
    def member_weights(self) -> np.ndarray:
        """Weights of the members: one member of weight 1."""
        return np.ones(1)

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model, stored with its predictions."""
        extractors = [tiles.extractor for tiles in self.tiles]
        return {
            "extractor": "+".join(extractors),
            "head": self.recipe.name,
            "n_members": 1,
            "recipe": repr(self.recipe),
        }

    def open(self, sdata: SpatialData, *, section: str) -> BaselineSection:
        """Check that a section matches the model, and predict its means.

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
            If the section was not tiled or embedded.
        ValueError
            If tiles, embeddings or staining differ from the model's. The error names the step to run again.
        """
        for expected in self.tiles:
            stated = specification(sdata, expected.extractor, context=expected.context_rings > 0)
            check_specification(stated, expected, section=section)
        seen = section_data(sdata, self.tiles, self.recipe)
        means = self.recipe.mean(self.learned, seen) * self.scale
        strangeness = self.familiarity.strangeness(np.concatenate(seen.embeddings, axis=1))
        return BaselineSection(means.astype(np.float32), self.dispersion, strangeness)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the config and arrays that the model is saved as."""
        config = {
            "genes": list(self.genes),
            "recipe": {"name": self.recipe.name, "options": options(self.recipe)},
            "tiles": [asdict(tiles) for tiles in self.tiles],
            "total": self.total,
            "interval_level": self.interval_level,
            "training": self.training,
        }
        arrays = {
            **{f"learned.{name}": array for name, array in self.learned.items()},
            **self.familiarity.arrays(),
            "scale": self.scale,
            "dispersion": self.dispersion,
            "floor": self.floor,
        }
        return config, arrays

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> BaselineModel:
        """Build a model from what `to_parts` returned."""
        known = recipes()
        name = config["recipe"]["name"]
        arrays = {_renamed(key): array for key, array in arrays.items()}
        hyperparameters = {
            key.replace("neighbours", "neighbors"): value for key, value in config["recipe"]["options"].items()
        }
        if name not in known:
            raise KeyError(f"the recipe is {name!r}, expected one of {sorted(known)}")
        n_genes = len(config["genes"])
        if any(arrays[key].shape[-1] != n_genes for key in ("scale", "dispersion", "floor")):
            raise KeyError(f"scale, dispersion and floor are not of {n_genes} genes")
        return cls(
            genes=tuple(config["genes"]),
            recipe=known[name](**hyperparameters),
            tiles=tuple(map(TileSpecification.of, config["tiles"])),
            learned=under("learned.", arrays),
            scale=arrays["scale"],
            dispersion=arrays["dispersion"],
            familiarity=FeatureSpace.from_arrays(arrays, standardize="cohort"),
            floor=arrays["floor"],
            total=config["total"],
            interval_level=config["interval_level"],
            training=dict(config["training"]),
        )

    def facts(self) -> Facts:
        """Names and values that describe the model, as notebooks show them."""
        return {
            "genes": counted(self.genes),
            "recipe": repr(self.recipe),
            **tile_facts(*self.tiles),
            **interval_facts(self.interval_level),
            **certificate_facts(self),
            **training_facts(self.training),
        }


@dataclass(frozen=True)
class BaselineSection:
    """A section with its predicted means.

    - `means`: predicted mean counts, ``float32 (n_tiles, n_genes)``.
    - `dispersion`: r, ``float32 (n_genes,)``.
    - `strangeness`: distance from the training tiles, ``float32 (n_tiles,)``.
    """

    means: np.ndarray
    dispersion: np.ndarray
    strangeness: np.ndarray

    def r_and_p(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return r and p of some tiles, each ``float32 (1, n_rows, n_genes)``."""
        means = self.means[rows]
        r = np.broadcast_to(self.dispersion, means.shape)
        return r[None], (r / (r + means))[None]


def section_data(sdata: SpatialData, tiles: tuple[TileSpecification, ...], recipe: Recipe) -> SectionData:
    """Read the embeddings and positions of a section's kept tiles, and pixels if the recipe needs them."""
    table = contract.tiles(sdata)
    keep = table.obs["keep"].to_numpy()
    image = contract.working_image_name(sdata)
    geometry = contract.tile_geometry(sdata, table[keep], image)
    return SectionData(
        embeddings=tuple(features(sdata, tile) for tile in tiles),
        name=contract.sample(sdata),
        positions=geometry.centers,
        pixels=_pixels(sdata, image, geometry, recipe.pixels_px) if "pixels" in recipe.needs else None,  # type: ignore[attr-defined]
    )


def _pixels(sdata: SpatialData, image: str, geometry: contract.TileGeometry, side: int) -> np.ndarray:
    """Cut and resize the tiles of the embedded image, ``uint8 (n_tiles, side, side, 3)``."""
    tiles = run_over_tiles(
        contract.levels(sdata, image),
        geometry.centers,
        np.asarray,
        sides=[geometry.side],
        target=side,
        key=f"pixels-{side}",
        description=f"{contract.sample(sdata)}: pixels",
    )
    return tiles[:, 0].astype(np.uint8)


def _renamed(key: str) -> str:
    for old, new in _OLD_NAMES.items():
        key = key.replace(old, new)
    return key
