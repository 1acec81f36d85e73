"""What members are validated on: sections that go round, never tiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from stimage_sd.tl._fit.training_set import held_out_tiles


def sections_of(sizes: list[int]) -> np.ndarray:
    return np.repeat([f"s{number}" for number in range(len(sizes))], sizes)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=7),
    validation=st.floats(0.01, 0.99),
    n_members=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_whole_sections_go_round(sizes: list[int], validation: float, n_members: int, seed: int) -> None:
    sections = sections_of(sizes)
    held = held_out_tiles(sections, np.zeros((len(sections), 2)), validation, n_members=n_members, seed=seed)
    assert held.shape == (n_members, len(sections))
    by_section = np.array(
        [[held[member, sections == name].mean() for name in np.unique(sections)] for member in range(n_members)]
    )
    assert set(np.unique(by_section)) <= {0.0, 1.0}  # never a part of a section
    each = by_section.sum(axis=1)
    assert (each >= 1).all()  # something to validate on
    assert (each <= len(sizes) - 1).all()  # and something to train on
    assert len(set(each)) == 1
    # sections take turns: how often each is held out differs by one at most
    times = by_section.sum(axis=0)
    assert times.max() - times.min() <= 1


def test_share_is_that_of_the_sections() -> None:
    sections = sections_of([5] * 10)
    for validation, expected in ((0.3, 3), (0.5, 5), (0.01, 1), (0.99, 9)):
        held = held_out_tiles(sections, np.zeros((50, 2)), validation, n_members=4, seed=0)
        assert (held.sum(axis=1) == 5 * expected).all()


def test_named_sections_are_held_out_of_all() -> None:
    sections = sections_of([3, 4, 5])
    for validation in (["s1"], "s1", ("s1",)):
        held = held_out_tiles(sections, np.zeros((12, 2)), validation, n_members=3, seed=0)
        np.testing.assert_array_equal(held, np.tile(sections == "s1", (3, 1)))


@given(n_side=st.integers(4, 15), share=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_a_single_section_is_parted_by_a_line(n_side: int, share: float, seed: int) -> None:
    points = np.stack(np.divmod(np.arange(n_side**2), n_side), axis=1).astype(float)
    held = held_out_tiles(np.repeat("only", len(points)), points, share, n_members=5, seed=seed)
    assert (held.sum(axis=1) == np.clip(round(share * len(points)), 1, len(points) - 1)).all()
    neighbors = np.array(sorted(cKDTree(points).query_pairs(1.01)))
    for part in held:
        across = (part[neighbors[:, 0]] != part[neighbors[:, 1]]).sum()
        # a straight cut through a square crosses no more than two sides' worth of bonds
        assert across <= 2 * n_side
    if n_side > 6 and 0.2 < share < 0.8:
        assert len({part.tobytes() for part in held}) > 1  # members differ


def test_seed_decides() -> None:
    sections, points = sections_of([4] * 6), np.zeros((24, 2))
    first, same, other = (held_out_tiles(sections, points, 0.3, n_members=2, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("validation", "match"),
    [
        (0.0, "share between 0 and 1 or a list of sections, found 0.0"),
        (1.0, "share between 0 and 1"),
        (-0.5, "share between 0 and 1"),
        (["s9"], r"some, not all, of the sections \['s0', 's1'\], found \['s9'\]"),
        ([], r"some, not all, .* found \[\]"),
        (["s0", "s1"], "some, not all"),
    ],
)
def test_refusals(validation: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        held_out_tiles(sections_of([3, 3]), np.zeros((6, 2)), validation, n_members=2, seed=0)
