"""Objects that other tools made, for the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Test modules are imported by path: their helper, which stands beside them, is not found otherwise.
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `peers` writes each instrument's files, once."""
    return tmp_path_factory.mktemp("bundles")
