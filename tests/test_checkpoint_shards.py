"""Opening checkpoint directories: what is read, what is refused and how it is named."""

import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.shards import NUMPY_DTYPES, Shards
from tests.checkpoint_files import DTYPE_NAMES, entry, write_index, write_raw, write_tensors

RNG = np.random.default_rng(0)
DTYPES = [dtype for dtype, name in DTYPE_NAMES.items() if name in NUMPY_DTYPES]


def findings(directory) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        Shards(directory)
    return caught.value.findings


def only_finding(directory) -> str:
    (finding,) = findings(directory)
    return finding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_every_dtype(tmp_path, dtype):
    stored = RNG.integers(0, 256, (3, 5, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    write_tensors(tmp_path / "a.safetensors", {"pad": np.ones(3, np.uint8), "x": stored})
    with Shards(tmp_path) as shards:
        tensor = shards.tensors["x"]
        out = np.empty(tensor.shape, NUMPY_DTYPES[tensor.dtype])
        shards.read_into(out, "x")
        tail = np.empty((2, 5), out.dtype)
        shards.read_into(tail, "x", start=5)
    assert (tensor.dtype, tensor.shape) == (DTYPE_NAMES[dtype], (3, 5))
    assert out.tobytes() == stored.tobytes()
    assert tail.tobytes() == stored[1:].tobytes()


def test_scalars_and_empty_tensors(tmp_path):
    tensors = {"scalar": np.array(2.5, np.float32), "empty": np.empty((0, 4), np.float32)}
    write_tensors(tmp_path / "a.safetensors", tensors)
    with Shards(tmp_path) as shards:
        scalar, empty = np.empty((), np.float32), np.empty((0, 4), np.float32)
        shards.read_into(scalar, "scalar")
        shards.read_into(empty, "empty")
    assert scalar == 2.5


def test_all_files_without_an_index(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": np.ones(1, np.float32)})
    write_tensors(tmp_path / "b.safetensors", {"y": np.ones(1, np.float32)})
    assert set(Shards(tmp_path).tensors) == {"x", "y"}


def test_only_the_files_of_the_index(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": np.ones(1, np.float32)})
    write_tensors(tmp_path / "b.safetensors", {"y": np.ones(1, np.float32)})
    write_index(tmp_path, {"x": "a.safetensors"})
    assert set(Shards(tmp_path).tensors) == {"x"}


def test_symbolic_links_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_tensors(tmp_path / "blobs" / "1234", {"x": np.ones(1, np.float32)})
    (tmp_path / "snapshot" / "a.safetensors").symlink_to(tmp_path / "blobs" / "1234")
    write_index(tmp_path / "snapshot", {"x": "a.safetensors"})
    assert set(Shards(tmp_path / "snapshot").tensors) == {"x"}


def test_directory_that_is_none(tmp_path):
    assert only_finding(tmp_path / "absent") == "not a directory"
    assert only_finding(tmp_path) == "no safetensors file"


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -9, -8, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": np.ones(2, np.float32)})
    path.write_bytes(path.read_bytes()[:keep])
    assert only_finding(tmp_path).startswith("a.safetensors: ")


def test_truncated_after_opening(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": np.ones(2, np.float32)})
    with Shards(tmp_path) as shards:
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"a\.safetensors: truncated"):
            shards.read_into(np.empty(2, np.float32), "x")


X = entry("F32", [2], 0, 8)
BROKEN_HEADERS = {
    "trailing bytes": ({"x": X}, 9),
    "overlapping ranges": ({"x": X, "y": entry("F32", [1], 4, 8)}, 8),
    "same range twice": ({"x": X, "y": X}, 8),
    "gap": ({"x": X, "y": entry("F32", [1], 12, 16)}, 16),
    "gap at the start": ({"x": entry("F32", [2], 4, 12)}, 12),
    "range beyond the file": ({"x": entry("F32", [4], 0, 16)}, 8),
    "reversed range": ({"x": entry("F32", [2], 8, 0)}, 8),
    "size is not shape times dtype": ({"x": entry("F32", [3], 0, 8)}, 8),
    "negative dimension": ({"x": entry("F32", [-2], 0, 8)}, 8),
    "overflowing shape": ({"x": entry("F32", [2**62, 4], 0, 8)}, 8),
    "unknown dtype": ({"x": entry("F13", [2], 0, 8)}, 8),
    "not an object": (b"[1, 2]", 0),
    "not JSON": (b"{nope", 0),
    "not UTF-8": (b'{"\xff": 1}', 0),
    "deep nesting": (b"[" * 10_000, 0),
    "duplicate name": (
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b' "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        8,
    ),
    "entry without dtype": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, 8),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_broken_header(tmp_path, case):
    header, data_bytes = BROKEN_HEADERS[case]
    write_raw(tmp_path / "a.safetensors", header, bytes(data_bytes))
    assert only_finding(tmp_path).startswith("a.safetensors: ")


@pytest.mark.parametrize("header_size", [1000, 2**40, 2**63, 2**64 - 1])
def test_header_size_beyond_the_file(tmp_path, header_size):
    write_raw(tmp_path / "a.safetensors", {"x": X}, bytes(8), header_size)
    assert only_finding(tmp_path).startswith("a.safetensors: ")


def test_every_broken_file_is_listed(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": np.ones(1, np.float32)})
    write_raw(tmp_path / "b.safetensors", b"", b"")
    (tmp_path / "c.safetensors").mkdir()
    b, c = findings(tmp_path)
    assert b.startswith("b.safetensors: ")
    assert c == "c.safetensors: no such file"


def test_same_tensor_in_two_files(tmp_path):
    for file in ("a", "b"):
        write_tensors(tmp_path / f"{file}.safetensors", {"x": np.ones(1, np.float32)})
    expected = "x: stored in both a.safetensors and b.safetensors"
    assert only_finding(tmp_path) == expected
    write_tensors(tmp_path / "b.safetensors", dict.fromkeys("xy", np.ones(1, np.float32)))
    write_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    assert only_finding(tmp_path) == expected


def test_index_and_files_disagree(tmp_path):
    write_tensors(tmp_path / "a.safetensors", dict.fromkeys("xy", np.ones(1, np.float32)))
    write_index(tmp_path, {"x": "a.safetensors", "z": "a.safetensors", "w": "b.safetensors"})
    assert findings(tmp_path) == (
        "z: in the index, not in a.safetensors",
        "y: in a.safetensors, not in the index",
        "b.safetensors: no such file",
    )


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "sub/../../a.safetensors", "/etc/a.safetensors", ".."]
)
def test_index_leaves_the_directory(tmp_path, file):
    inside = tmp_path / "inside"
    inside.mkdir()
    write_tensors(tmp_path / "a.safetensors", {"x": np.ones(1, np.float32)})
    write_index(inside, {"x": file})
    assert only_finding(inside) == f"model.safetensors.index.json: {file!r} leaves the directory"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"weight_map": 1}',
        b'{"weight_map": {"x": 1}}',
        b'{"weight_map": {"x": "a.safetensors", "x": "a.safetensors"}}',
        b"[" * 100_000,
    ],
)
def test_index_that_is_none(tmp_path, text):
    write_tensors(tmp_path / "a.safetensors", {"x": np.ones(1, np.float32)})
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    assert only_finding(tmp_path).startswith(
        "model.safetensors.index.json: not a safetensors index"
    )


def test_message_lists_twenty_and_counts_the_rest():
    message = str(CheckpointError("dir", [f"finding {i}" for i in range(23)]))
    assert message.startswith("dir: 23 problems\n  finding 0\n")
    assert "finding 19" in message and "finding 20" not in message
    assert message.endswith("and 3 more")
    assert str(CheckpointError("dir", ["bad"])) == "dir: 1 problem\n  bad"


def test_bfloat16_is_a_float():
    assert NUMPY_DTYPES["BF16"] == ml_dtypes.bfloat16
