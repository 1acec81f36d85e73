"""A fitted baseline: a recipe, what it learnt, and a dispersion a gene; and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from spatialdata import SpatialData

from stimage_sd import contract
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._files import write_model
from stimage_sd.models._specification import TileSpecification, check_specification, features, specification
from stimage_sd.models.baselines._recipe import Recipe, SectionData, options, recipes
from stimage_sd.stream import run_over_tiles


@dataclass(frozen=True)
class BaselineModel:
    """A model of one mean a gene and tile, with one dispersion a gene, as a negative binomial.

    Made by `stimage_sd.tl.fit_baseline`, loaded by `stimage_sd.models.load`.

    Attributes
    ----------
    genes
        Names of the genes, in the order of every array's last axis.
    recipe
        The hyperparameters, one of `stimage_sd.models.baselines`.
    tiles
        What tiles and embeddings must be, for each extractor.
    learnt
        The recipe's arrays.
    scale
        ``float32 (n_genes,)``: what the recipe's means are multiplied by, so that they agree with counts of tiles
        that were left out.
    dispersion
        ``float32 (n_genes,)``: r, of highest likelihood for those.
    familiarity
        By which strangeness is told.
    floor
        ``float32 (2, n_genes)``: mean and dispersion (r) of the mean-only fit to the training counts.
    total
        The size factor 1, the training tiles' median total count, where the recipe's target is ``"lognorm"``.
    interval_level
        Nominal level at which central intervals covered 90 % of left-out counts.
    training
        What was fitted, for the reader: sections, seed, package version.
    """

    genes: tuple[str, ...]
    recipe: Recipe
    tiles: tuple[TileSpecification, ...]
    learnt: Mapping[str, np.ndarray]
    scale: np.ndarray
    dispersion: np.ndarray
    familiarity: FeatureSpace
    floor: np.ndarray
    total: float | None = None
    interval_level: float = 0.9
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def member_weights(self) -> np.ndarray:
        """One member, of weight 1."""
        return np.ones(1)

    @property
    def description(self) -> dict[str, Any]:
        """What predictions say about their model."""
        extractors = [tiles.extractor for tiles in self.tiles]
        return {
            "extractor": "+".join(extractors),
            "head": self.recipe.name,
            "n_members": 1,
            "recipe": repr(self.recipe),
        }

    def open(self, sdata: SpatialData, *, section: str) -> BaselineSection:
        """Check that a section is as the model expects, and predict its means.

        Parameters
        ----------
        sdata
            The section.
        section
            Its name, for errors.

        Returns
        -------
        The section, for `r_and_p`.

        Raises
        ------
        KeyError
            If the section was not tiled or embedded.
        ValueError
            If tiles, embeddings or staining are not those of the model; the error names the step to run again.
        """
        for expected in self.tiles:
            found = specification(sdata, expected.extractor, context=expected.context_rings > 0)
            check_specification(found, expected, section=section)
        seen = section_data(sdata, self.tiles, self.recipe)
        means = self.recipe.mean(self.learnt, seen) * self.scale
        strangeness = self.familiarity.strangeness(np.concatenate(seen.embeddings, axis=1))
        return BaselineSection(means.astype(np.float32), self.dispersion, strangeness)

    def save(self, path: str | Path) -> Path:
        """Write the model: one file where the path ends in ``.stimage``, a directory otherwise.

        Parameters
        ----------
        path
            Where to.

        Returns
        -------
        The path.
        """
        config = {
            "genes": list(self.genes),
            "recipe": {"name": self.recipe.name, "options": options(self.recipe)},
            "tiles": [asdict(tiles) for tiles in self.tiles],
            "total": self.total,
            "interval_level": self.interval_level,
            "training": self.training,
        }
        arrays = {
            **{f"learnt.{name}": array for name, array in self.learnt.items()},
            **self.familiarity.arrays(),
            "scale": self.scale,
            "dispersion": self.dispersion,
            "floor": self.floor,
        }
        return write_model(path, kind="baseline", config=config, arrays=arrays)

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> BaselineModel:
        """Put a model together from what `save` wrote."""
        known = recipes()
        name = config["recipe"]["name"]
        if name not in known:
            raise KeyError(f"the recipe is {name!r}, expected one of {sorted(known)}")
        n_genes = len(config["genes"])
        if any(arrays[key].shape[-1] != n_genes for key in ("scale", "dispersion", "floor")):
            raise KeyError(f"scale, dispersion and floor are not of {n_genes} genes")
        tiles = [{**each, "fields_of_view": tuple(each["fields_of_view"])} for each in config["tiles"]]
        return cls(
            genes=tuple(config["genes"]),
            recipe=known[name](**config["recipe"]["options"]),
            tiles=tuple(TileSpecification(**each) for each in tiles),
            learnt={key.removeprefix("learnt."): array for key, array in arrays.items() if key.startswith("learnt.")},
            scale=arrays["scale"],
            dispersion=arrays["dispersion"],
            familiarity=FeatureSpace.from_arrays(arrays, standardize="cohort"),
            floor=arrays["floor"],
            total=config["total"],
            interval_level=config["interval_level"],
            training=dict(config["training"]),
        )

    def __repr__(self) -> str:
        sections = ", ".join(self.training.get("sections", []))
        extractors = " and ".join(tiles.extractor for tiles in self.tiles)
        return f"BaselineModel: {len(self.genes)} genes, {self.recipe!r}, on {extractors}; trained on {sections}"


@dataclass(frozen=True)
class BaselineSection:
    """A section with its predicted means.

    Attributes
    ----------
    means
        ``float32 (n_tiles, n_genes)``.
    dispersion
        ``float32 (n_genes,)``.
    strangeness
        ``float32 (n_tiles,)``.
    """

    means: np.ndarray
    dispersion: np.ndarray
    strangeness: np.ndarray

    def r_and_p(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Parameters of the negative binomials of some tiles, each ``float32 (1, n_rows, n_genes)``."""
        means = self.means[rows]
        r = np.broadcast_to(self.dispersion, means.shape)
        return r[None], (r / (r + means))[None]


def section_data(sdata: SpatialData, tiles: tuple[TileSpecification, ...], recipe: Recipe) -> SectionData:
    """Read what a recipe sees of a section: embeddings and positions of its kept tiles, and pixels where needed."""
    table = contract.tiles(sdata)
    keep = table.obs["keep"].to_numpy()
    positions = np.asarray(table.obsm["spatial"], dtype=np.float64)[keep]
    return SectionData(
        embeddings=tuple(features(sdata, each) for each in tiles),
        positions=positions,
        pixels=_pixels(sdata, positions, recipe.pixels_px) if "pixels" in recipe.needs else None,  # type: ignore[attr-defined]
    )


def _pixels(sdata: SpatialData, centers: np.ndarray, side: int) -> np.ndarray:
    """Tiles of the image that embeddings are of, resized, ``uint8 (n_tiles, side, side, 3)``."""
    tiles = run_over_tiles(
        contract.levels(sdata, contract.working_image_name(sdata)),
        centers,
        np.asarray,
        sides=[contract.tiling(sdata)["side_px"]],
        target=side,
        key=f"pixels-{side}",
        description=f"{contract.sample(sdata)}: pixels",
    )
    return tiles[:, 0].astype(np.uint8)
