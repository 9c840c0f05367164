"""What `make sanitize` runs makes every call of the library."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from dsv4_ffi.targets import CALLS
from tests.sanitizer.cases import SUBJECTS


def test_every_call_has_cases():
    assert set().union(*(calls for calls, _ in SUBJECTS.values())) == set(CALLS)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_case(subject):
    """One of each subject; all results are zero."""
    called = set()

    def call(name, shapes, *arrays, **options):
        del arrays, options
        called.add(name)
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    calls, cases = SUBJECTS[subject]
    case = next(cases())
    with mock.patch("dsv4_ffi.call", call), jax.disable_jit():
        case()
    assert called and called <= calls
