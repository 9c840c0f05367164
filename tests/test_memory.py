"""Room on the device, asked before it is taken."""

from unittest.mock import Mock

import jax
import numpy as np
import pytest

from dsv4_jax import memory


def device(stats):
    return Mock(spec=jax.Device, memory_stats=lambda: stats)


def test_free_bytes_are_those_below_the_limit(monkeypatch):
    full = device({"bytes_limit": 1000, "bytes_in_use": 400})
    monkeypatch.setattr(jax, "devices", lambda: [full])
    assert memory.free_bytes() == 600


def test_free_bytes_of_several_devices_are_those_of_the_fullest():
    devices = [device({"bytes_limit": 1000, "bytes_in_use": used}) for used in (100, 700, 400)]
    assert memory.free_bytes(devices) == 300


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 5}])
def test_a_backend_that_does_not_count(monkeypatch, stats):
    monkeypatch.setattr(jax, "devices", lambda: [device(stats)])
    assert memory.free_bytes() is None
    memory.check_room("weights", 10**18, lambda free: "nothing")


def test_room_is_checked():
    devices = [device({"bytes_limit": 5000, "bytes_in_use": 2000})]
    memory.check_room("weights", 3000, lambda free: "", devices)
    message = "memory: weights need 3,001 bytes, free are 3,000 of .*; 3 layers would fit"
    with pytest.raises(ValueError, match=message):
        memory.check_room("weights", 3001, lambda free: f"{free // 1000} layers", devices)


def test_bytes_of_a_tree():
    tree = {"a": np.zeros((2, 3), np.int16), "b": jax.ShapeDtypeStruct((4,), np.float32)}
    assert memory.tree_bytes(tree) == 28


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
