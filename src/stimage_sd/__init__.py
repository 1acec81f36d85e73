"""STImage on SpatialData: gene expression and cell types from H&E, as distributions with uncertainty.

The package is quick to import, because its modules (`io`, `pp`, `tl`, `pl`, `models` and others) load on first use.
"""

from __future__ import annotations

import os
from typing import Any

import lazy_loader

from stimage_sd._cache import keep_kernels
from stimage_sd._settings import settings

# Without this variable, ONNX Runtime writes a device id to the home folder and sends usage data. ONNX Runtime reads the
# variable on import. All modules that import ONNX Runtime load after this line, in workers and subprocesses too.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# By default JAX takes three quarters of a GPU's memory at its first use, which is when it reads this variable. Torch,
# which runs the foundation models, and other processes, such as the workers of a cluster, would find no memory left.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

__version__: str

_load, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["baselines", "contract", "datasets", "io", "likelihood", "models", "pl", "pp", "stats", "tl"],
)
__all__ += ["__version__", "settings"]


def __getattr__(name: str) -> Any:
    if name != "__version__":
        return _load(name)
    # The metadata's own imports take longer than the rest of this file.
    from importlib.metadata import version

    globals()["__version__"] = version("stimage-sd")
    return globals()["__version__"]


keep_kernels()
