"""Members of an ensemble as models of their own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, SupportsIndex, TypeVar

from stimage_sd.models._certificate import without_certificate

Model = TypeVar("Model")


class Members(Generic[Model]):
    """The members of an ensemble. Indexing gives a model of the chosen members, of the same kind.

    The model predicts, is saved and is combined like any other. It keeps the floor, shifts and interval level of the
    whole ensemble. To set the level anew, call `stimage_sd.tl.calibrate`.

    Parameters
    ----------
    n_members
        Number of members.
    choose
        Function that returns the model of some members, given their indices.

    Examples
    --------
    >>> members = Members(4, lambda chosen: chosen)
    >>> members[1:3], members[-1], members[[0, 2]], len(members)
    ([1, 2], [3], [0, 2], 4)
    """

    def __init__(self, n_members: int, choose: Callable[[list[int]], Model]) -> None:
        self._n_members, self._choose = n_members, choose

    def __len__(self) -> int:
        """Return the number of members."""
        return self._n_members

    def __iter__(self) -> Iterator[Model]:
        """Yield the model of each single member."""
        return (self._choose([member]) for member in range(self._n_members))

    def __getitem__(self, index: SupportsIndex | slice | Sequence[SupportsIndex]) -> Model:
        """Return the model of one member, of a slice, or of a list of members.

        Raises
        ------
        IndexError
            If there is no such member.
        TypeError
            If the index is no integer, slice or sequence of integers.
        ValueError
            If no member is chosen, or one more than once.
        """
        if isinstance(index, slice):
            chosen = list(range(self._n_members))[index]
        else:
            chosen = [self._checked(one) for one in (index if _is_sequence(index) else [index])]  # type: ignore[union-attr]
        if not chosen:
            raise ValueError(f"Expected at least one of {self._n_members} members, found none in {index!r}.")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"Expected every member at most once, found {chosen}.")
        return self._choose(chosen)

    def _checked(self, index: Any) -> int:
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise TypeError(f"Expected integers, a slice or a list of integers as members, found {index!r}.")
        member = operator.index(index)
        if not -self._n_members <= member < self._n_members:
            raise IndexError(f"No member {member}: the model has {self._n_members} members.")
        return member % self._n_members

    def __repr__(self) -> str:
        return f"Members: {self._n_members}, index them for a model of some"


def _is_sequence(index: Any) -> bool:
    return hasattr(index, "__len__") and not isinstance(index, str | bytes)


def training_of(training: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
    """Return the record of a fit for some members, which are numbered anew. The sections stay all that were given.

    Examples
    --------
    >>> training_of({"metrics": {"validation_nll": [3.0, 1.0, 2.0]}, "seed": 0}, [2, 0])
    {'metrics': {'validation_nll': [2.0, 3.0]}, 'seed': 0, 'members': [2, 0]}
    """
    record = without_certificate(training)
    if "metrics" in record:
        record["metrics"] = {name: [values[member] for member in chosen] for name, values in record["metrics"].items()}
    if "validation" in record:
        record["validation"] = [record["validation"][member] for member in chosen]
    if "history" in record and "member" in record["history"]:
        renumbered = {member: number for number, member in enumerate(chosen)}
        history = record["history"]
        rows = [row for row, member in enumerate(history["member"]) if member in renumbered]
        record["history"] = {name: [values[row] for row in rows] for name, values in history.items()}
        record["history"]["member"] = [renumbered[history["member"][row]] for row in rows]
    before = record.get("members")
    record["members"] = [before[member] for member in chosen] if before else list(chosen)
    return record
