"""Members of an ensemble spread over the devices of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def member_devices(n_members: int) -> list[Any]:
    """Return the devices of this process that members are spread over: as many as share them out evenly.

    Parameters
    ----------
    n_members
        Members of the ensemble.

    Returns
    -------
    So many of `jax.local_devices` as the largest divisor of `n_members` that there are: 10 members take 5 of 8
    devices, two each. An ensemble of a multiple of the devices keeps all of them busy.

    Examples
    --------
    >>> len(member_devices(1))
    1
    """
    devices = jax.local_devices()
    return devices[: max(n for n in range(1, len(devices) + 1) if n_members % n == 0)]


def shard_members(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Place each member's share of some arrays on the device of that member.

    What is computed of them by compiled functions stays there; other arguments of those functions are copied to all
    devices. Members share no parameter, so nothing passes between devices but what is summed over members.

    Parameters
    ----------
    arrays
        Arrays whose leading axis is the member.

    Returns
    -------
    The same arrays; on one device, untouched.

    Examples
    --------
    >>> shard_members({"bias": np.zeros((10, 3))})["bias"].shape
    (10, 3)
    """
    devices = member_devices(len(next(iter(arrays.values()))))
    if len(devices) == 1:
        return dict(arrays)
    sharding = NamedSharding(Mesh(np.array(devices), ("member",)), PartitionSpec("member"))
    return {name: jax.device_put(array, sharding) for name, array in arrays.items()}
