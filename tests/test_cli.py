"""The command line, in this process; the model recites a text."""

import json
import math
import os
import runpy
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsv4_jax
from dsv4_jax import Config, Kernels, cli
from dsv4_jax.bench.random_model import random_model
from dsv4_jax.decoding import generate as generation
from dsv4_jax.mini import text
from dsv4_jax.numerics import Numerics
from dsv4_jax.text.chat import encode_messages
from dsv4_jax.text.tokenizer import Tokenizer
from tests import chain_model
from tests.chain_model import ChainModel
from tests.checkpoints import random_config
from tests.test_text_tokenizer import trained

TEXT = "hello 漢字 🙂 there, and more"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(trained().to_str())


@pytest.fixture(scope="module")
def recitation(tokenizer):
    """Logits of each position that give token ids from a position on, then EOS."""

    def rows(ids, begin):
        # Of one size, so that all of them share a program.
        rows = np.full((160, tokenizer.vocab_size), -10.0)
        rows[:, tokenizer.eos_id] = 0.0
        rows[begin + np.arange(len(ids)), ids] = 10.0
        return rows

    return rows


@pytest.fixture
def loaded(monkeypatch, tokenizer, recitation):
    """Puts a model that writes a text after a prompt of some tokens in the place of any other."""
    chain_model.install(monkeypatch)
    monkeypatch.setattr(generation, "_max_slots", lambda: 4)
    calls = []

    def install(text=TEXT, prompt_tokens=1, tokenizer=tokenizer):
        model = ChainModel(recitation(tokenizer.encode(text), prompt_tokens), False, tokenizer)
        model.forward = lambda tokens: jnp.zeros((*np.shape(tokens), tokenizer.vocab_size))

        def load(source, **options):
            calls.append((source, options))
            return model

        monkeypatch.setattr(dsv4_jax, "load", load)
        return model

    install.calls = calls
    return install


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line; (exit code, stdout, stderr). `stdin` None is a terminal."""

    def run(*args, stdin=None):
        read, write = os.pipe()
        with os.fdopen(read) as reader, os.fdopen(write, "wb") as writer:
            if stdin is None:
                monkeypatch.setattr(os, "fstat", lambda fd: os.stat("/dev/null"))
            else:
                writer.write(stdin)
            writer.close()
            monkeypatch.setattr(sys, "stdin", reader)
            monkeypatch.setattr(sys, "argv", ["dsv4", *map(str, args)])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def refused(result, message, code=2):
    """The command wrote one line of error and nothing else."""
    exit_code, out, err = result
    assert err.startswith("Error: ") and err.count("\n") == 1, err
    assert message in err
    assert (exit_code, out) == (code, "")


def test_generate_continues_the_prompt(loaded, run, tokenizer):
    model = loaded(prompt_tokens=1 + len(tokenizer.encode("abc")))
    code, out, err = run("generate", "--prompt", "abc")
    assert (code, out) == (0, TEXT + "\n")
    assert err.startswith("abc")
    num = len(tokenizer.encode(TEXT))
    assert f"{num} tokens, " in err and "tokens/s" in err and "first chunk" in err
    assert model.prefilled_widths[0][1][0] == 1 + len(tokenizer.encode("abc"))


def test_generate_without_arguments(loaded, run, tokenizer):
    loaded(prompt_tokens=1 + len(tokenizer.encode(cli.DEFAULT_PROMPT)))
    code, out, err = run("generate")
    assert (code, out) == (0, TEXT + "\n")
    assert err.startswith(cli.DEFAULT_PROMPT)
    options = {"dtype": None, "numerics": Numerics.CHECKPOINT, "progress": True}
    assert loaded.calls == [("mini", options)]


def test_generate_from_stdin(loaded, run, tokenizer):
    prompt = "漢字\nand a second line\n"
    loaded(prompt_tokens=1 + len(tokenizer.encode(prompt)))
    code, out, err = run("generate", stdin=prompt.encode())
    assert (code, out) == (0, TEXT + "\n")
    assert err.startswith(prompt)


def test_the_prompt_option_wins_over_stdin(loaded, run):
    loaded(prompt_tokens=2)
    assert run("generate", "--prompt", "a", stdin=b"something long")[1] == TEXT + "\n"


def test_a_silent_pipe_gets_the_default_prompt(loaded, run, monkeypatch):
    loaded()
    monkeypatch.setattr(cli, "STDIN_PATIENCE_SECONDS", 0.01)
    read, write = os.pipe()
    with os.fdopen(read) as reader:
        monkeypatch.setattr(sys, "stdin", reader)
        assert cli._piped_text() is None
    os.close(write)


def test_a_file_as_stdin(monkeypatch, tmp_path):
    (tmp_path / "prompt").write_bytes("漢\r\n".encode())
    with open(tmp_path / "prompt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert cli._piped_text() == "漢\r\n"


def test_options_reach_model_and_sampling(loaded, run, monkeypatch):
    loaded(prompt_tokens=2)
    seen = []
    whole = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *args: seen.append(args) or whole(*args))
    code, out, _ = run(
        *["generate", "--prompt", "a", "--model", "some/where", "--dtype", "float32"],
        *["--numerics", "exact", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.9"],
        *["--min-p", "0.1", "--seed", "7", "--stop", "x", "--stop", "漢", "--max-new-tokens", "50"],
    )
    assert (code, out) == (0, "hello \n")
    options = {"dtype": "float32", "numerics": Numerics.EXACT, "progress": True}
    assert loaded.calls == [("some/where", options)]
    params = seen[0][2]
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.5, 3, 0.9, 0.1)
    assert (params.seed, params.stop, params.max_new_tokens) == (7, ("x", "漢"), 50)


def test_prompts_file(loaded, run, tmp_path):
    model = loaded(prompt_tokens=2)
    file = tmp_path / "prompts"
    file.write_bytes(b"a\nb\r\nc\nd\ne\nf")
    code, out, err = run("generate", "--prompts-file", file)
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines == [{"prompt": p, "text": TEXT, "finish": "stop"} for p in "abcdef"]
    assert "tokens/s" in err
    assert {len(lengths) for _, lengths in model.prefilled_widths} == {4}


def interrupt_after(monkeypatch, num_chunks):
    run, calls = generation._decode_chunk, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) > num_chunks:
            raise KeyboardInterrupt
        return run(*args, **options)

    monkeypatch.setattr(generation, "_decode_chunk", interrupted)


def test_ctrl_c_leaves_what_was_written(loaded, run, monkeypatch, tokenizer):
    loaded(prompt_tokens=2)
    interrupt_after(monkeypatch, 1)
    code, out, err = run("generate", "--prompt", "a")
    assert code == 130
    assert out == tokenizer.decode(tokenizer.encode(TEXT)[:9]).rstrip("\ufffd") + "\n"
    assert "9 tokens" in err and "Traceback" not in err


def test_ctrl_c_leaves_what_a_batch_has(loaded, run, monkeypatch, tmp_path):
    loaded(prompt_tokens=2)
    interrupt_after(monkeypatch, 1)
    (tmp_path / "prompts").write_text("a\nb")
    code, out, _ = run("generate", "--prompts-file", tmp_path / "prompts")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 130
    assert [line["prompt"] for line in lines] == ["a", "b"]
    assert all(line["finish"] is None and TEXT.startswith(line["text"]) for line in lines)
    assert all(line["text"] for line in lines)


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["generate", "--prompt", ""], None, "--prompt: the prompt is empty"),
        (["generate"], b"", "stdin: the prompt is empty"),
        (["generate"], b"ab\xffc", "stdin is not UTF-8: byte 0xff at offset 2"),
        (["generate", "--prompts-file", "bad"], None, "bad is not UTF-8: byte 0xe9 at offset 3"),
        (["generate", "--prompts-file", "empty"], None, "empty is empty"),
        (["generate", "--prompts-file", "gap"], None, "gap, line 2: the prompt is empty"),
        (["generate", "--prompts-file", "none"], None, "'none' does not exist"),
        (["generate", "--prompts-file", "gap", "--prompt", "a"], None, "exclude each other"),
        (["generate", "--numerics", "best"], None, "'best' is not one of"),
        (["generate", "--dtype", "int8"], None, "'int8' is not one of"),
        (["generate", "--top-k", "x"], None, "'x' is not a valid int"),
        (["generate", "--frobnicate"], None, "--frobnicate"),
        (["eval", "none"], None, "'none' does not exist"),
        (["eval", "empty"], None, "empty is empty"),
        (["eval", "bad"], None, "bad is not UTF-8"),
        (["eval", "--without", "heads"], None, "'heads' is not one of"),
        (["eval", "--experts", "int4"], None, "'int4' is not one of"),
        (["sing"], None, "No such command 'sing'"),
    ],
)
def test_user_errors_before_a_model_is_loaded(run, tmp_path, monkeypatch, args, stdin, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dsv4_jax, "load", None)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "gap").write_bytes(b"a\n\nb\n")
    (tmp_path / "bad").write_bytes("a漢".encode()[:1] + b"bc\xe9")
    refused(run(*args, stdin=stdin), message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--top-p", "3"], "top_p: got 3.0, expected a number in (0, 1]"),
        (["--temperature", "nan"], "temperature: got nan"),
        (["--seed", "-1"], "seed: got -1"),
        (["--max-new-tokens", "0"], "max_new_tokens: got 0"),
        (["--stop", ""], "stop: got"),
        (["--max-new-tokens", "5000"], "max_position_embeddings 4096"),
        (["--prompt", "x" * 5000], "max_position_embeddings 4096"),
        (["--prompt", "\udcff"], "lone surrogate"),
    ],
)
def test_user_errors_of_values(loaded, run, args, message):
    loaded()
    refused(run("generate", *args), message, code=1)


def test_a_missing_model(run):
    for command in (["generate"], ["chat"], ["eval", __file__]):
        refused(run(*command, "--model", "nowhere"), "'nowhere'", code=1)


def test_a_model_without_tokenizer(loaded, run):
    loaded().tokenizer = None
    refused(run("generate"), "no tokenizer", code=1)
    refused(run("chat"), "no tokenizer")
    refused(run("eval", __file__), "no tokenizer", code=1)


@pytest.fixture
def chat(loaded, run, tokenizer, recitation):
    """Runs a conversation; the model recites all its turns in place."""

    def chat(questions, answers, *args, thinking_mode="chat"):
        script = transcript(questions, answers, thinking_mode)
        rows = recitation(tokenizer.encode(script, allow_special=True), 0)
        model = loaded("")
        model.graph, model.params = nnx.split(chain_model.Table(rows, False))
        model.rows = np.asarray(rows, np.float32)
        return run("chat", *args, stdin="".join(f"{q}\n" for q in questions).encode())

    return chat


def transcript(questions, answers, thinking_mode):
    messages, script = [], ""
    for question, answer in zip(questions, answers, strict=True):
        messages += [{"role": "user", "content": question}]
        prompt = encode_messages(messages, thinking_mode=thinking_mode)
        messages += [{"role": "assistant", "content": answer}]
        script += prompt[len(script) :]
        script += answer
    return script


def test_chat_remembers_the_conversation(chat):
    code, out, err = chat(["hi", "who?"], ["hello 漢字", "there"], "--temperature", "0")
    assert (code, err) == (0, "")
    assert out == "> hello 漢字\n> there\n> \n"


def test_chat_shows_the_reasoning(chat):
    args = "--thinking", "--temperature", "0"
    result = chat(["hi"], ["so be it</think>hello"], *args, thinking_mode="thinking")
    assert result == (0, "> so be it</think>hello\n> \n", "")


def test_ctrl_c_ends_an_answer_only(chat, monkeypatch):
    interrupt_after(monkeypatch, 1)
    code, out, err = chat(["hi"], ["hello there, hello world, hello"], "--temperature", "0")
    assert (code, err) == (0, "")
    assert out.startswith("> hello") and out.endswith("\n> \n")


def test_blank_lines_are_no_questions(loaded, run):
    loaded()
    assert run("chat", stdin=b"\n  \n") == (0, "> > > \n", "")


def test_eval_of_a_uniform_model(loaded, run, tmp_path, tokenizer):
    loaded()
    text = "hello 漢字\r\n" * 30
    (tmp_path / "text").write_bytes(text.encode())
    code, out, _ = run("eval", tmp_path / "text", "--context", "16")
    tokens, num_bytes = len(tokenizer.encode(text)), len(text.encode())
    expected = tokens * math.log2(tokenizer.vocab_size) / num_bytes
    assert code == 0
    assert out == f"bits per byte: {expected:.4f}\ntokens: {tokens}\nbytes: {num_bytes}\n"


def test_eval_without_a_file_reads_the_held_out_modules(loaded, run, tokenizer, monkeypatch):
    loaded()
    documents = [text.Document("heapq.py", "import this\n"), text.Document("csv.py", "x = 1\n")]
    monkeypatch.setattr(text, "held_out", lambda: documents)
    code, out, _ = run("eval", "--context", "16")
    assert code == 0
    tokens = sum(len(tokenizer.encode(document.text)) for document in documents)
    assert out.splitlines()[1:] == [f"tokens: {tokens}", "bytes: 18"]


def test_eval_of_a_cache_format(loaded, run, tmp_path):
    loaded()
    (tmp_path / "text").write_text("x = 1\n")
    for name, rounds in (("records", True), ("dense", False)):
        for numerics in ("checkpoint", "exact"):
            options = ("--cache", name, "--numerics", numerics, "--context", "16")
            assert run("eval", tmp_path / "text", *options)[0] == 0
            points = loaded.calls[-1][1]["numerics"]
            others = getattr(Numerics, numerics.upper())
            assert points == replace(others, quantize_kv=rounds, quantize_indexer=rounds)


def test_eval_of_a_variant(run, tmp_path, tokenizer):
    """A real model: what is changed shows, and formats of the same values do not."""
    layers = {"num_hidden_layers": 2, "compress_ratios": [0, 4], "num_hash_layers": 1}
    config = Config.from_dict(random_config(vocab_size=tokenizer.vocab_size, **layers))
    model = random_model(config, dtype="float32", kernels=Kernels.XLA)
    model.save(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(trained().to_str())
    (tmp_path / "text").write_text("def parse(line):\n    return line.split()\n" * 20)

    def bits(*options):
        model = ("--model", tmp_path / "model", "--context", "256")
        code, out, err = run("eval", tmp_path / "text", *model, *options)
        assert code == 0, err
        return float(out.splitlines()[0].removeprefix("bits per byte: "))

    shipped = bits()
    assert bits("--without", "compressed") != shipped
    assert bits("--experts", "nvfp4") == shipped


@pytest.mark.parametrize("context", [0, -3, 4097])
def test_eval_context(loaded, run, context):
    loaded()
    refused(run("eval", __file__, "--context", context), f"context: got {context}", code=1)


def test_info(run):
    code, out, err = run("info", "flash", "--gpus", "4", "--gpu-memory", "80")
    assert (code, err) == (0, "")
    assert "159,609,485,896" in out


def test_info_errors(run, tmp_path):
    refused(run("info", tmp_path / "none"), "none", code=1)
    refused(run("info", "flash", "--gpus", "0"), "got 0, expected at least 1", code=1)
    refused(run("info"), "Missing argument")


def test_help_is_complete(run):
    code, out, _ = run()
    assert code == 0
    for command in ("info", "generate", "chat", "eval"):
        assert command in out
        assert "--help" in run(command, "--help")[1]


def test_the_package_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dsv4", "bench", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dsv4_jax", run_name="__main__")
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("decode", "prefill", "kernels"))


def test_a_reader_that_goes_away_is_no_error(run, monkeypatch):
    def gone(**options):
        raise BrokenPipeError

    closed = []
    monkeypatch.setattr(cli.cli, "main", gone)
    monkeypatch.setattr(os, "dup2", lambda *fds: closed.append(fds))
    assert run("--help") == (1, "", "")
    assert len(closed) == 1
