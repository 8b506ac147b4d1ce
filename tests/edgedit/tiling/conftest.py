"""Random autoencoders, converted once a session."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import pytest
from tiled_models import TiledModel

SEED = secrets.randbits(31)


@pytest.fixture(scope="session")
def tiled_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TiledModel]:
    """kind → a converted autoencoder with fresh random weights."""
    made: dict[str, TiledModel] = {}

    def get(kind: str) -> TiledModel:
        if kind not in made:
            made[kind] = TiledModel(kind, SEED, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get
