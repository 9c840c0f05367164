"""The fixed texts of the prompt format, read from the file that the model's repository ships."""

import ast
import hashlib
import os
from pathlib import Path

ENCODING_FILE = "encoding/encoding_dsv4.py"
REASONING_EFFORT_MAX = "REASONING_EFFORT_MAX"
TOOLS_TEMPLATE = "TOOLS_TEMPLATE"
RESPONSE_FORMAT_TEMPLATE = "response_format_template"

_SHA256 = {
    REASONING_EFFORT_MAX: "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7",
    TOOLS_TEMPLATE: "09b7269daaddbeaf11a3ed55c07b1846c35162b841d8b4301bbe0449879d1fd8",
    RESPONSE_FORMAT_TEMPLATE: "012f31fcc1338bdfe25b132eaf56ab020ee75ab8e649f37b30b8e5f544fb17a5",
}


def load_constants(directory: str | os.PathLike[str]) -> dict[str, str]:
    """Fixed texts of a model directory, by their names in its `encoding/encoding_dsv4.py`.

    The file is parsed, never executed. A name that it does not define is left out.

    Raises:
        FileNotFoundError: the directory has no encoding file.
        ValueError: the file is not Python, or a text is not the one that DeepSeek-V4 was
            trained with.
    """
    path = Path(directory) / ENCODING_FILE
    try:
        module = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: not a Python file: {error}") from error
    texts = {}
    for statement in module.body:
        for name, value in _assignments(statement):
            if name in _SHA256:
                texts[name] = _checked(path, name, value)
    return texts


def _assignments(statement: ast.stmt) -> list[tuple[str, ast.expr]]:
    match statement:
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            return [(name, value)]
        case ast.Assign(targets=targets, value=value):
            return [(target.id, value) for target in targets if isinstance(target, ast.Name)]
    return []


def _checked(path: Path, name: str, value: ast.expr) -> str:
    if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
        raise ValueError(f"{path}: {name} is not a string literal")
    encoded = value.value.encode("utf-8", errors="surrogatepass")
    digest = hashlib.sha256(encoded).hexdigest()
    if digest != _SHA256[name]:
        raise ValueError(
            f"{path}: {name} has {len(encoded)} bytes and sha256 {digest}, "
            f"expected sha256 {_SHA256[name]}"
        )
    return value.value
