"""STImage on SpatialData: gene expression and cell types from H&E, as distributions with uncertainty.

The package is quick to import, because its modules (`io`, `pp`, `tl`, `pl`, `models` and others) load on first use.
"""

from __future__ import annotations

import os

import lazy_loader

from stimage_sd._cache import keep_kernels
from stimage_sd._settings import settings

# Without this variable, ONNX Runtime writes a device id to the home folder and sends usage data. ONNX Runtime reads the
# variable on import. All modules that import ONNX Runtime load after this line, in workers and subprocesses too.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["baselines", "contract", "datasets", "io", "likelihood", "models", "pl", "pp", "stats", "tl"],
)
__all__ += ["__version__", "settings"]

keep_kernels()
