"""Split tiles into training and validation by patient, by section, or by a contiguous part of a single section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def held_out_tiles(
    sections: np.ndarray,
    positions: np.ndarray,
    validation: float | Sequence[str],
    *,
    n_members: int,
    seed: int,
    patients: Mapping[str, str] | None = None,
) -> np.ndarray:
    """Choose the held-out tiles of each member.

    Parameters
    ----------
    sections
        ``(n_tiles,)`` section name per tile.
    positions
        ``(n_tiles, 2)`` x and y per tile.
    validation
        Share of the patients to hold out per member, rotating among members. Or names of sections to hold out for
        all members.
    n_members
        Number of members.
    seed
        Seed of the order of patients, or of the held-out part of a single section.
    patients
        Patient by section. A section of unknown patient counts as a patient. If all sections are of one patient, each
        section counts as a patient.

    Returns
    -------
    ``bool (n_members, n_tiles)``, True for held-out tiles. Training and held-out tiles are neighbors only at the
    border of a held-out part.

    Raises
    ------
    ValueError
        If no section would be left to train on, `validation` is invalid, or it names some but not all sections of one
        of several patients.

    Examples
    --------
    >>> sections = np.array(["a", "a", "b", "b", "c", "c"])
    >>> held = held_out_tiles(sections, np.zeros((6, 2)), 0.3, n_members=3, seed=0)
    >>> held.sum(axis=1)
    array([2, 2, 2])
    >>> bool(held.any(axis=0).all())
    True
    """
    names = list(dict.fromkeys(sections.tolist()))
    unit = {name: (patients or {}).get(name, name) for name in names}
    if len(set(unit.values())) == 1:
        unit = {name: name for name in names}
    if isinstance(validation, str) or not isinstance(validation, int | float):
        chosen = [validation] if isinstance(validation, str) else list(validation)
        unknown = sorted(set(chosen) - set(names))
        if unknown or not chosen or len(set(chosen)) == len(names):
            raise ValueError(f"Expected `validation` to name some, not all, of the sections {names}, found {chosen}.")
        split = [name for name in names if name not in chosen and unit[name] in {unit[held] for held in chosen}]
        if split:
            raise ValueError(
                f"`validation` holds out {chosen} but not {split}, which are of the same patients. Name all sections "
                "of a patient, or none."
            )
        return np.tile(np.isin(sections, chosen), (n_members, 1))
    if not 0 < validation < 1:
        raise ValueError(f"Expected `validation` as a share between 0 and 1 or a list of sections, found {validation}.")
    random = np.random.default_rng([seed, 2])
    if len(names) == 1:
        return np.stack([_part(positions, validation, random) for _ in range(n_members)])
    units = list(dict.fromkeys(unit.values()))
    n_held = min(max(1, round(validation * len(units))), len(units) - 1)
    order = random.permutation(units)
    turns = [[order[(member * n_held + turn) % len(units)] for turn in range(n_held)] for member in range(n_members)]
    of_tile = np.array([unit[name] for name in sections.tolist()])
    return np.stack([np.isin(of_tile, turn) for turn in turns])


def _part(positions: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Hold out the tiles farthest along a random direction."""
    angle = random.uniform(0, 2 * np.pi)
    along = positions @ np.array([np.cos(angle), np.sin(angle)])
    n_held = min(max(1, round(share * len(along))), len(along) - 1)
    held = np.zeros(len(along), dtype=bool)
    held[np.argsort(-along, kind="stable")[:n_held]] = True
    return held
