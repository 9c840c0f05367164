"""Conversions that are interrupted, damaged or refused, and the command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import dsv4_jax
from dsv4_jax import cli
from dsv4_jax.checkpoint import convert_files, files
from dsv4_jax.checkpoint.convert_files import convert
from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.config import Config
from tests.checkpoint_files import save
from tests.checkpoints import random_tensors
from tests.weight_formats import CONFIG, EXPERTS, checkpoint, contents

LIMIT = 300_000
SMALL = CONFIG | {"num_hidden_layers": 1, "compress_ratios": [0, 0]}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("small") / "in", "mxfp4", config=SMALL)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, small):
    directory = tmp_path_factory.mktemp("reference") / "out"
    convert(small, directory, experts="nvfp4", max_shard_bytes=LIMIT)
    assert len(list(directory.glob("*.safetensors"))) == 4
    return contents(directory)


def interrupt(monkeypatch, owner, name, call) -> list[int]:
    """Makes a call of a function fail; the list counts the calls."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(len(calls))
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return calls


@pytest.mark.parametrize(
    ("owner", "name"), [(files.os, "fsync"), (convert_files, "convert_matrices")]
)
def test_any_interruption(tmp_path, small, uninterrupted, owner, name):
    call, interrupted = 0, True
    while interrupted:
        call += 1
        directory = tmp_path / str(call)
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, owner, name, call)
            try:
                convert(small, directory, experts="nvfp4", max_shard_bytes=LIMIT)
                interrupted = False
            except KeyboardInterrupt:
                # What is left when the process is killed.
                (directory / "model-00002-of-00004.safetensors.tmp").write_bytes(b"half")
                journal = directory / "conversion.journal"
                if journal.exists():
                    journal.write_bytes(journal.read_bytes() + b'{"file": "model-000')
                    assert not (directory / "config.json").exists() or call > 12
        if interrupted:
            convert(small, directory, experts="nvfp4", max_shard_bytes=LIMIT)
        written = contents(directory)
        written.pop("model-00002-of-00004.safetensors.tmp", None)
        assert written == uninterrupted, call
    assert call > 8


def test_finished_shards_are_kept(tmp_path, small, uninterrupted, monkeypatch):
    options = {"experts": "nvfp4", "max_shard_bytes": LIMIT}
    with pytest.MonkeyPatch.context() as patch:
        calls = interrupt(patch, convert_files, "_write_shard", 3)
        with pytest.raises(KeyboardInterrupt):
            convert(small, tmp_path, **options)
    assert len(calls) == 3
    finished = {path: path.stat() for path in tmp_path.glob("*.safetensors")}
    assert len(finished) == 2
    changed, kept = finished
    raw = bytearray(changed.read_bytes())
    raw[-1] ^= 1
    changed.write_bytes(raw)
    calls = interrupt(monkeypatch, convert_files, "_write_shard", 0)
    convert(small, tmp_path, **options)
    assert len(calls) == 3
    assert kept.stat() == finished[kept]
    assert contents(tmp_path) == uninterrupted


def test_a_journal_cut_short_again_and_again(tmp_path, small, uninterrupted):
    options = {"experts": "nvfp4", "max_shard_bytes": LIMIT}
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, convert_files, "_write_shard", 2)
            with pytest.raises(KeyboardInterrupt):
                convert(small, tmp_path, **options)
        with (tmp_path / "conversion.journal").open("ab") as journal:
            journal.write(b'{"file": "model-000')
    convert(small, tmp_path, **options)
    assert contents(tmp_path) == uninterrupted


@pytest.mark.parametrize("damage", ["byte", "truncated", "shape"])
def test_what_was_written_wrongly_is_found(tmp_path, small, uninterrupted, damage):
    write = files.write_shard

    def damaged(path, tensors, arrays):
        write(path, tensors, arrays)
        raw = bytearray(path.read_bytes())
        if damage == "byte":
            raw[-100] ^= 1
        elif damage == "truncated":
            del raw[-1]
        else:
            raw = raw.replace(b'"shape":[160,80]', b'"shape":[80,160]', 1)
        path.write_bytes(raw)

    options = {"experts": "nvfp4", "max_shard_bytes": LIMIT}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_shard", damaged)
        with pytest.raises(CheckpointError, match=r"holds other bytes|model-00001") as caught:
            convert(small, tmp_path, **options)
    assert len(caught.value.findings) == 1
    number = 2 if damage == "shape" else 1  # the first shard has no such tensor
    assert len(contents(tmp_path)) == number and "conversion.journal" in contents(tmp_path)
    convert(small, tmp_path, **options)
    assert contents(tmp_path) == uninterrupted


def test_other_options_or_input_are_refused(tmp_path, small):
    source, target = checkpoint(tmp_path / "in", "mxfp4", config=SMALL), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, convert_files, "_write_shard", 2)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, experts="nvfp4", max_shard_bytes=LIMIT)
    before = contents(target)
    for options, message in (
        ({"experts": "fp8", "max_shard_bytes": LIMIT}, "begun with experts nvfp4, expected"),
        ({"experts": "nvfp4", "linears": "bf16"}, "begun with linears None, expected the same"),
        ({"experts": "nvfp4"}, f"begun with max_shard_bytes {LIMIT}, expected the same"),
    ):
        with pytest.raises(ValueError, match=f"target: got {target}, {message}"):
            convert(source, target, **options)
    with pytest.raises(ValueError, match="begun with another input, expected the same"):
        convert(small, target, experts="nvfp4", max_shard_bytes=LIMIT)
    part = source / "part1.safetensors"
    part.write_bytes(part.read_bytes())
    with pytest.raises(ValueError, match="begun with another input, expected the same"):
        convert(source, target, experts="nvfp4", max_shard_bytes=LIMIT)
    assert contents(target) == before


# Refusals: nothing is written


def test_bad_directories(tmp_path, small):
    before = contents(small)
    (tmp_path / "mine").write_text("mine")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ValueError, match=f"target: got {target}, expected an absent or empty"):
            convert(small, target, experts="nvfp4")
    with pytest.raises(ValueError, match="the source itself, expected another directory"):
        convert(small, small / ".." / small.name, experts="nvfp4")
    with pytest.raises(ValueError, match=r"source: got '.*nowhere', expected an existing directo"):
        convert(tmp_path / "nowhere", tmp_path / "out", experts="nvfp4")
    with pytest.raises(ValueError, match="experts, linears: got None, expected a format"):
        convert(small, tmp_path / "out")
    with pytest.raises(ValueError, match="max_shard_bytes: got 0, expected at least 1"):
        convert(small, tmp_path / "out", experts="nvfp4", max_shard_bytes=0)
    convert(small, tmp_path / "out", experts="fp8")
    with pytest.raises(ValueError, match="expected an absent or empty directory"):
        convert(small, tmp_path / "out", experts="fp8")
    assert contents(small) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_unreadable_input(tmp_path):
    source = checkpoint(tmp_path / "in", "mxfp4", config=SMALL)
    part = source / "part1.safetensors"
    raw = part.read_bytes()
    part.write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match=r"part1\.safetensors"):
        convert(source, tmp_path / "out", experts="nvfp4")
    part.write_bytes(raw)
    (source / "config.json").write_text(json.dumps(SMALL | {"vocab_size": 47}))
    with pytest.raises(CheckpointError, match=r"embed.weight: shape \[48, 160\], expected \[47"):
        convert(source, tmp_path / "out", experts="nvfp4")
    (source / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        convert(source, tmp_path / "out", experts="nvfp4")
    assert not (tmp_path / "out").exists()


def test_values_and_widths_that_cannot_be_packed(tmp_path):
    tensors = random_tensors(CONFIG, seed=1)
    name = "layers.1.ffn.experts.1.w2.weight"
    tensors[name][3, 4] = np.nan
    source = save(tmp_path / "in", tensors)
    (source / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=f"{name}: arrays: got values that are NaN or infin"):
        convert(source, tmp_path / "out", experts="nvfp4")
    config = CONFIG | {"moe_intermediate_size": 72}
    source = save(tmp_path / "in", random_tensors(config, seed=1))
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "new", experts="mxfp4")
    assert len(caught.value.findings) == 3 * EXPERTS
    assert caught.value.findings[0] == (
        "layers.0.ffn.experts.0.w2.weight: 72 inputs, mxfp4 needs a multiple of 32"
    )
    assert not (tmp_path / "new").exists()


# The command


def command(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dsv4", "convert", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def test_command_converts_the_bundled_model(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    code, text, _ = command(monkeypatch, capsys, "mini", out, "--experts", "nvfp4")
    config = Config.from_json(out)
    num_blocks = config.num_hidden_layers + config.num_nextn_predict_layers
    num_matrices = 3 * config.n_routed_experts * num_blocks
    assert code == 0
    assert text.splitlines() == [
        f"matrices with the same values: {num_matrices}",
        "matrices quantised anew: 0",
    ]
    tokenizer = Path(dsv4_jax.__file__).parent / "mini" / "tokenizer.json"
    assert (out / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert dsv4_jax.load(out).config.expert_dtype == "nvfp4"


def test_command_lists_what_was_not_exact(tmp_path, monkeypatch, capsys):
    source = checkpoint(tmp_path / "in", "fp8_block", config=SMALL)
    arguments = (source, tmp_path / "out", "--experts", "mxfp4")
    monkeypatch.setattr(cli, "MAX_LISTED", 2)
    code, text, _ = command(monkeypatch, capsys, *arguments)
    lines = text.splitlines()
    num_matrices = 6 * EXPERTS
    assert code == 0
    assert lines[:2] == [
        "matrices with the same values: 0",
        f"matrices quantised anew: {num_matrices}",
    ]
    assert lines[2].startswith("relative error: mean 0.1")
    assert lines[3].startswith("  layers.0.ffn.experts.0.w1.weight: 0.1")
    assert lines[5:] == [f"  and {num_matrices - 2} more, all in {tmp_path}/out/conversion.json"]


def test_command_refuses_in_one_line(tmp_path, monkeypatch, capsys, small):
    for arguments, exit_code, message in (
        ((small, small, "--experts", "nvfp4"), 1, "the source itself"),
        ((small, tmp_path / "out"), 2, "Nothing to convert: give --experts or --linears."),
        ((small, tmp_path / "out", "--experts", "fp4"), 2, "'fp4' is not one of"),
        ((small, tmp_path / "out", "--linears", "nvfp4"), 2, "'nvfp4' is not one of"),
        (("/nowhere", tmp_path / "out", "--experts", "fp8"), 1, "expected an existing directory"),
        ((small, small.parent, "--experts", "fp8"), 1, "expected an absent or empty directory"),
    ):
        code, text, err = command(monkeypatch, capsys, *arguments)
        assert (code, text, err.count("\n")) == (exit_code, "", 1), err
        assert err.startswith("Error: ") and message in err


def test_command_interrupted(tmp_path, monkeypatch, capsys, small):
    arguments = (small, tmp_path / "out", "--experts", "nvfp4")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, convert_files, "convert_matrices", 3)
        code, _, err = command(monkeypatch, capsys, *arguments)
    assert code == 130 and err.endswith("Interrupted. The same command continues.\n")
    assert command(monkeypatch, capsys, *arguments)[0] == 0
