"""Shared fixtures; every array annotation of the library is checked at run time."""

from pathlib import Path

import numpy as np
import pytest
from jaxtyping import install_import_hook

install_import_hook("dsv4_jax", "beartype.beartype").__enter__()

import jax.numpy as jnp  # noqa: E402

import dsv4_jax  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "tiny-flash"


@pytest.fixture(scope="session", autouse=True)
def program_cache(tmp_path_factory):
    """Commands keep their compiled programs here, not with the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSV4_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        yield


@pytest.fixture(scope="session")
def golden():
    """Outputs of an independent implementation for the checkpoint in `GOLDEN`."""
    return np.load(GOLDEN / "golden.npz")


@pytest.fixture(scope="session")
def tiny():
    """The golden checkpoint in float32 without quantisation points."""
    return dsv4_jax.load(GOLDEN, dtype=jnp.float32, numerics=dsv4_jax.Numerics.EXACT)
