"""Distribution of ensemble members over the devices of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def member_devices(n_members: int) -> list[Any]:
    """Return the local devices over which ensemble members can be distributed evenly.

    Their number is the largest possible divisor of `n_members`: 10 members use 5 of 8 devices, two members per device.

    >>> len(member_devices(1))
    1
    """
    devices = jax.local_devices()
    return devices[: max(n for n in range(1, len(devices) + 1) if n_members % n == 0)]


def shard_members(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Place the arrays of each member, whose leading axis is the member, on the device of that member.

    Compiled functions keep their results on the same devices and copy other arguments to all devices. Members share no
    parameters, so devices exchange only sums over members. With one device the arrays stay as they are.

    >>> shard_members({"bias": np.zeros((10, 3))})["bias"].shape
    (10, 3)
    """
    devices = member_devices(len(next(iter(arrays.values()))))
    if len(devices) == 1:
        return dict(arrays)
    sharding = NamedSharding(Mesh(np.array(devices), ("member",)), PartitionSpec("member"))
    return {name: jax.device_put(array, sharding) for name, array in arrays.items()}
