"""Fixed texts of the prompt format: taken from a file without running it, and verified."""

import hashlib

import pytest

from dsv4_jax.text import constants
from dsv4_jax.text.constants import load_constants

FILE = '''
from typing import Never

raise SystemExit("this file must not run")

REASONING_EFFORT_MAX = (
    "think "
    "hard"
)
response_format_template: str = "as {schema}"
TOOLS_TEMPLATE = """tools:
{tool_schemas}"""
REASONING_EFFORT_MAX.lower().title = other = 5
undecided: str
'''
TEXTS = {
    "REASONING_EFFORT_MAX": "think hard",
    "response_format_template": "as {schema}",
    "TOOLS_TEMPLATE": "tools:\n{tool_schemas}",
}


def directory_with(tmp_path, content: str | bytes):
    path = tmp_path / "encoding" / "encoding_dsv4.py"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


@pytest.fixture
def expect_these_texts(monkeypatch):
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in TEXTS.items()}
    monkeypatch.setattr(constants, "_SHA256", digests)


def test_texts_are_found(tmp_path, expect_these_texts):
    directory = directory_with(tmp_path, FILE)
    assert load_constants(directory) == load_constants(str(directory)) == TEXTS


def test_published_digests():
    shown = {name: (digest[:8], digest[-4:]) for name, digest in constants._SHA256.items()}
    assert shown == {
        "REASONING_EFFORT_MAX": ("f7a24f3b", "50f7"),
        "TOOLS_TEMPLATE": ("09b7269d", "1fd8"),
        "response_format_template": ("012f31fc", "17a5"),
    }


def test_undefined_name_is_left_out(tmp_path, expect_these_texts):
    assert load_constants(directory_with(tmp_path, 'TOOLS = "x"\n')) == {}


def test_last_definition_counts(tmp_path, expect_these_texts):
    directory = directory_with(tmp_path, FILE + 'REASONING_EFFORT_MAX = "think less"\n')
    with pytest.raises(ValueError, match="REASONING_EFFORT_MAX has 10 bytes and sha256"):
        load_constants(directory)


def test_other_text_is_refused(tmp_path):
    directory = directory_with(tmp_path, 'TOOLS_TEMPLATE = "mine é"\n')
    with pytest.raises(ValueError, match=r"TOOLS_TEMPLATE has 7 bytes.*09b7269d"):
        load_constants(directory)


@pytest.mark.parametrize("value", ["open('x').read()", "b'think hard'", "'think' + ' hard'", "5"])
def test_only_literals_are_read(tmp_path, expect_these_texts, value):
    directory = directory_with(tmp_path, f"REASONING_EFFORT_MAX = {value}\n")
    with pytest.raises(ValueError, match="REASONING_EFFORT_MAX is not a string literal"):
        load_constants(directory)


@pytest.mark.parametrize(
    "content", ["def f(:", b"x = 1\0", b"x = '\xff'", "(" * 5000, "-" * 200_000 + "1"]
)
def test_not_python(tmp_path, content):
    with pytest.raises(ValueError, match=r"encoding_dsv4\.py: not a Python file"):
        load_constants(directory_with(tmp_path, content))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"encoding_dsv4\.py"):
        load_constants(tmp_path)
