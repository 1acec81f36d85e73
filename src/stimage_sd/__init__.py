"""STImage on SpatialData: gene expression and cell types from H&E, as distributions with uncertainty.

The package is light to import: `io`, `pp`, `tl`, `pl`, `models`, `nn` and `datasets` are loaded on
first use.
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["contract", "datasets", "io", "models", "nn", "pl", "pp", "stream", "tl"],
)
__all__ += ["__version__"]
