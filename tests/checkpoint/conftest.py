"""What tests of damaged files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to write hostile bytes into."""
    return tmp_path_factory.mktemp("files") / "model.safetensors"
