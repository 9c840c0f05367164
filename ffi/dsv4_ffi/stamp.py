"""The hash of a library's sources. Run as a script it writes the C++ file that holds it."""

import hashlib
import sys
from pathlib import Path

_SOURCES = Path(__file__).parent.parent
_PATTERNS = {
    "cpu": ("include/dsv4/*.h", "cpu/*.h", "cpu/*.cc"),
    "cuda": ("include/dsv4/*.h", "cuda/*.cuh", "cuda/*.cu"),
}


def source_hash(platform: str) -> str | None:
    """Of the sources beside this package; None where it is installed without them."""
    files = [file for pattern in _PATTERNS[platform] for file in sorted(_SOURCES.glob(pattern))]
    if not files:
        return None
    contents = hashlib.sha256()
    for file in files:
        contents.update(file.name.encode() + b"\0" + file.read_bytes())
    return contents.hexdigest()


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(
        f'extern "C" {{ extern const char dsv4_source_hash[] = "{source_hash(sys.argv[1])}"; }}\n'
    )
