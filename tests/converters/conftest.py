"""One tiny pipeline whose matrices can be quantized."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from quantizable import save_quantizable


@pytest.fixture(scope="session")
def quantizable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantizable")
    save_quantizable(folder, random.randrange(2**31))
    return folder
