"""Split tiles into training and validation by section, or by a contiguous part of a single section."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def held_out_tiles(
    sections: np.ndarray, positions: np.ndarray, validation: float | Sequence[str], *, n_members: int, seed: int
) -> np.ndarray:
    """Choose the held-out tiles of each member.

    Parameters
    ----------
    sections
        ``(n_tiles,)`` section name per tile.
    positions
        ``(n_tiles, 2)`` x and y per tile.
    validation
        Share of the sections to hold out per member, rotating among members. Or names of sections to hold out for
        all members.
    n_members
        Number of members.
    seed
        Seed of the section order, or of the held-out part of a single section.

    Returns
    -------
    ``bool (n_members, n_tiles)``, True for held-out tiles. Training and held-out tiles are neighbors only at the
    border of a held-out part.

    Raises
    ------
    ValueError
        If no section would be left to train on, or `validation` is invalid.

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
    if isinstance(validation, str) or not isinstance(validation, int | float):
        chosen = [validation] if isinstance(validation, str) else list(validation)
        unknown = sorted(set(chosen) - set(names))
        if unknown or not chosen or len(set(chosen)) == len(names):
            raise ValueError(f"Expected `validation` to name some, not all, of the sections {names}, found {chosen}.")
        return np.tile(np.isin(sections, chosen), (n_members, 1))
    if not 0 < validation < 1:
        raise ValueError(f"Expected `validation` as a share between 0 and 1 or a list of sections, found {validation}.")
    random = np.random.default_rng([seed, 2])
    if len(names) == 1:
        return np.stack([_part(positions, validation, random) for _ in range(n_members)])
    each = min(max(1, round(validation * len(names))), len(names) - 1)
    order = random.permutation(names)
    turns = [[order[(member * each + turn) % len(names)] for turn in range(each)] for member in range(n_members)]
    return np.stack([np.isin(sections, turn) for turn in turns])


def _part(positions: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Hold out the tiles farthest along a random direction."""
    angle = random.uniform(0, 2 * np.pi)
    along = positions @ np.array([np.cos(angle), np.sin(angle)])
    n_held = min(max(1, round(share * len(along))), len(along) - 1)
    held = np.zeros(len(along), dtype=bool)
    held[np.argsort(-along, kind="stable")[:n_held]] = True
    return held
