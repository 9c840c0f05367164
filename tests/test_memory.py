"""Room on the device, asked before it is taken."""

import jax
import pytest

from dsv4_jax import memory


class Device:
    def __init__(self, stats):
        self._stats = stats

    def memory_stats(self):
        return self._stats


def test_free_bytes_are_those_below_the_limit(monkeypatch):
    device = Device({"bytes_limit": 1000, "bytes_in_use": 400})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert memory.free_bytes() == 600


def test_a_backend_that_does_not_count(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device(None)])
    assert memory.free_bytes() is None


NAMES = (
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((None, None, None), ("false", None, "0.95")),
        (("true", None, "0.5"), ("true", None, "0.5")),
        # JAX refuses both names of the fraction at once.
        ((None, "0.5", None), ("false", "0.5", None)),
    ],
)
def test_the_users_settings_stay(monkeypatch, before, after):
    for name, value in zip(NAMES, before, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    environ = dict(memory.os.environ)
    monkeypatch.setattr(memory.os, "environ", environ)
    memory.use_all_memory_as_needed()
    assert tuple(environ.get(name) for name in NAMES) == after
