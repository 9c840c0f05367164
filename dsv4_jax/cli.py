"""The command `dsv4`. Heavy imports are inside the commands, so that help is quick."""

import io
import json
import os
import select
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv4_jax.bench.command import bench

if TYPE_CHECKING:
    from dsv4_jax.decoding.generate import Piece
    from dsv4_jax.model import Model

DEFAULT_PROMPT = '''class Queue:
    """A first-in, first-out queue."""

    def __init__(self'''
# A pipe that nobody writes to must not keep the default prompt waiting.
STDIN_PATIENCE_SECONDS = 5.0
MAX_LISTED = 20

Command = Callable[..., Any]
TEXT_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def main() -> None:
    """Runs the command line; an error of the user's ends it with one line and exit code 1 or 2."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:
        # Else Python reports it again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except (ValueError, OSError) as error:
        _fail(str(error), 1)


def _fail(message: str, exit_code: int) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(exit_code)


@click.group(invoke_without_command=True, context_settings={"show_default": True})
@click.version_option(package_name="dsv4-jax")
@click.pass_context
def cli(context: click.Context) -> None:
    """DeepSeek-V4 inference in JAX."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_model_options = _options(
    click.option("--model", "source", default="mini", help="Checkpoint directory, or mini."),
    click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float32"]),
        help="Compute dtype.  [default: float32 on a CPU, else the checkpoint's]",
    ),
    click.option("--numerics", type=click.Choice(["checkpoint", "exact"]), default="checkpoint"),
)


def _sampling_options(
    temperature: float, top_p: float, max_new_tokens: int
) -> Callable[[Command], Command]:
    return _options(
        click.option("--temperature", default=temperature, help="0 takes the likeliest token."),
        click.option("--top-k", default=0, help="0 keeps all tokens."),
        click.option("--top-p", default=top_p, help="1 keeps all tokens."),
        click.option("--min-p", default=0.0, help="0 keeps all tokens."),
        click.option("--seed", default=0),
        click.option("--stop", multiple=True, help="Ends the text before this; repeatable."),
        click.option("--max-new-tokens", default=max_new_tokens),
    )


def _load(
    source: str,
    dtype: str | None,
    numerics: str,
    cache: str | None = None,
    experts: str | None = None,
) -> "Model":
    import dsv4_jax
    from dsv4_jax.compilation import cache_directory, keep_compiled_programs
    from dsv4_jax.kernels import Kernels
    from dsv4_jax.memory import use_all_memory_as_needed
    from dsv4_jax.numerics import Numerics
    from dsv4_jax.variants import rebuilt

    use_all_memory_as_needed()
    keep_compiled_programs(cache_directory())
    points: Numerics = getattr(Numerics, numerics.upper())
    if cache is not None:
        rounds = cache == "records"
        points = replace(points, quantize_kv=rounds, quantize_indexer=rounds)
    options: dict[str, Any] = {"dtype": dtype, "numerics": points, "progress": True}
    if experts is None:
        return dsv4_jax.load(source, **options)
    # As stored; what is converted then goes into the order of the kernels.
    model = dsv4_jax.load(source, **options, kernels=Kernels.XLA)
    return rebuilt(model, experts=experts, kernels=Kernels.FASTEST)


@cli.command()
@click.argument("source", metavar="PATH|flash|pro|mini", required=False)
@click.option("--gpus", "num_gpus", default=1, help="GPUs of the memory plan.")
@click.option("--gpu-memory", "gpu_memory_gb", default=141.0, help="GB (10^9 bytes) of each.")
@click.option("--kernels", is_flag=True, help="Which kernels can run here, and why others cannot.")
def info(source: str | None, kernels: bool, **plan: Any) -> None:
    """Show a model's layers, parameters, bytes and a memory plan, or the kernels' state."""
    if kernels:
        from dsv4_jax.kernel_info import render as render_kernels

        click.echo(render_kernels())
        return
    if source is None:
        raise click.UsageError("Missing argument 'PATH|flash|pro|mini'.")
    from dsv4_jax.info import find_config, render

    click.echo(render(find_config(source), source, **plan))


@cli.command()
@click.option("--prompt", help="Text to continue; by default what is piped in, or a little Python.")
@click.option("--prompts-file", type=TEXT_FILE, help="A prompt on each line; prints JSON lines.")
@_model_options
@_sampling_options(temperature=0.8, top_p=0.9, max_new_tokens=256)
def generate(
    prompt: str | None,
    prompts_file: Path | None,
    source: str,
    dtype: str | None,
    numerics: str,
    **sampling: Any,
) -> None:
    """Continue text, token by token."""
    prompts = _prompts(prompt, prompts_file)

    from dsv4_jax.decoding.generate import encode_prompt
    from dsv4_jax.decoding.generate import generate as continuations
    from dsv4_jax.decoding.sampling import SamplingParams

    params = SamplingParams(**sampling)
    model = _load(source, dtype, numerics)
    pieces = continuations(model, [encode_prompt(model, text) for text in prompts], params)
    speed = _Speed()
    try:
        if prompts_file is None:
            _echo_text(prompts[0], speed.watch(pieces))
        else:
            _echo_json_lines(prompts, speed.watch(pieces))
    except KeyboardInterrupt:
        click.echo(speed.report(), err=True)
        raise click.Abort from None
    click.echo(speed.report(), err=True)


@cli.command()
@click.option("--system", help="System message.")
@click.option("--thinking", is_flag=True, help="Reason before answering.")
@_model_options
@_sampling_options(temperature=1.0, top_p=1.0, max_new_tokens=4096)
def chat(
    system: str | None,
    thinking: bool,
    source: str,
    dtype: str | None,
    numerics: str,
    **sampling: Any,
) -> None:
    """Talk to a model. Ctrl-C ends an answer, Ctrl-D the conversation."""
    from dsv4_jax.decoding.generate import generate as continuations
    from dsv4_jax.decoding.sampling import SamplingParams
    from dsv4_jax.text.chat import encode_chat
    from dsv4_jax.text.special_tokens import THINK_END

    params = SamplingParams(**sampling)
    model = _load(source, dtype, numerics)
    if model.tokenizer is None:
        raise click.UsageError(f"{source} has no tokenizer.")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for question in _questions():
        messages.append({"role": "user", "content": question})
        mode = "thinking" if thinking else "chat"
        prompt = encode_chat(model.tokenizer, messages, thinking_mode=mode)
        room = model.config.max_position_embeddings - len(prompt)
        turn = replace(
            params,
            max_new_tokens=max(1, min(params.max_new_tokens, room)),
            seed=(params.seed + len(messages)) % 2**32,
        )
        answer = ""
        with suppress(KeyboardInterrupt):
            for piece in continuations(model, [prompt], turn):
                answer += piece.text
                click.secho(piece.text, nl=False, dim=thinking and THINK_END not in answer)
        click.echo()
        reasoning, _, content = answer.partition(THINK_END) if thinking else ("", "", answer)
        messages.append({"role": "assistant", "content": content, "reasoning_content": reasoning})


@cli.command()
@_model_options
@click.option("--context", default=8192, help="Prompt and continuation together, in tokens.")
def warmup(source: str, dtype: str | None, numerics: str, context: int) -> None:
    """Compile what generate and chat run for texts of up to so many tokens.

    Compiled programs and XLA's autotuning results are kept in $DSV4_CACHE_DIR, by default
    ~/.cache/dsv4-jax, for every command from then on.
    """
    from dsv4_jax.decoding.generate import warm_up

    begin = time.perf_counter()
    model = _load(source, dtype, numerics)
    num_programs = warm_up(model, min(context, model.config.max_position_embeddings))
    seconds = time.perf_counter() - begin
    click.echo(f"{num_programs} programs ready after {seconds:.1f} s")


@cli.command("eval")
@click.argument("files", nargs=-1, type=TEXT_FILE)
@click.option("--context", type=int, help="Tokens of a window, BOS included.  [default: 2048]")
@click.option(
    "--experts",
    type=click.Choice(["nvfp4", "mxfp4", "fp8", "bf16"]),
    help="Convert the routed experts to this format first.",
)
@click.option(
    "--cache",
    type=click.Choice(["records", "dense"]),
    help="Whether cached entries are rounded to their records.  [default: as --numerics]",
)
@click.option(
    "--without",
    "missing",
    type=click.Choice(["compressed", "selection"]),
    help="Mask the compressed attention branches, or select their entries at random.",
)
@_model_options
def evaluate(
    files: tuple[Path, ...],
    context: int | None,
    experts: str | None,
    cache: str | None,
    missing: str | None,
    source: str,
    dtype: str | None,
    numerics: str,
) -> None:
    """Measure how well a model predicts text files, in bits per byte.

    Without FILES: the modules of Python's standard library that the mini model never saw.
    """
    from dsv4_jax.decoding.evaluate import evaluate as evaluated
    from dsv4_jax.mini.text import held_out
    from dsv4_jax.variants import without

    if files:
        texts = [_decode(file.read_bytes(), str(file)) for file in files]
        for file, text in zip(files, texts, strict=True):
            if not text:
                raise click.UsageError(f"{file} is empty.")
    else:
        texts = [document.text for document in held_out()]
    model = _load(source, dtype, numerics, cache, experts)
    if missing is not None:
        model = without(model, missing)
    if context is None:
        context = min(2048, model.config.max_position_embeddings)
    result = evaluated(model, texts, context)
    click.echo(f"bits per byte: {result.bits_per_byte:.4f}")
    click.echo(f"tokens: {result.num_tokens}")
    click.echo(f"bytes: {sum(result.num_bytes)}")


@cli.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--experts",
    type=click.Choice(["nvfp4", "mxfp4", "fp8", "bf16"]),
    help="Format of the routed experts.  [default: as they are]",
)
@click.option(
    "--linears",
    type=click.Choice(["fp8", "bf16"]),
    help="Format of the other packed matrices.  [default: as they are]",
)
def convert(source: str, target: Path, experts: str | None, linears: str | None) -> None:
    """Write the checkpoint IN (a directory, or mini) to OUT with its weights in other formats.

    Values stay the same where the format can hold them. What is interrupted continues when the
    same command is run again.
    """
    from dsv4_jax.checkpoint.convert_files import REPORT_FILE
    from dsv4_jax.checkpoint.convert_files import convert as converted
    from dsv4_jax.model import MINI_DIRECTORY

    if experts is None and linears is None:
        raise click.UsageError("Nothing to convert: give --experts or --linears.")
    directory = MINI_DIRECTORY if source == "mini" else Path(source)
    try:
        report = converted(directory, target, experts=experts, linears=linears, progress=True)
    except KeyboardInterrupt:
        click.echo("\nInterrupted. The same command continues.", err=True)
        raise click.Abort from None
    click.echo(f"matrices with the same values: {report.num_exact}")
    errors = report.relative_errors
    click.echo(f"matrices quantised anew: {len(errors)}")
    if errors:
        mean, largest = sum(errors.values()) / len(errors), max(errors.values())
        click.echo(f"relative error: mean {mean:.3g}, largest {largest:.3g}")
        for name, error in list(errors.items())[:MAX_LISTED]:
            click.echo(f"  {name}: {error:.3g}")
        if len(errors) > MAX_LISTED:
            click.echo(f"  and {len(errors) - MAX_LISTED} more, all in {target / REPORT_FILE}")


cli.add_command(bench)


def _prompts(prompt: str | None, prompts_file: Path | None) -> list[str]:
    """What to continue; never nothing."""
    if prompt is not None and prompts_file is not None:
        raise click.UsageError("--prompt and --prompts-file exclude each other.")
    if prompts_file is not None:
        lines = io.StringIO(_decode(prompts_file.read_bytes(), str(prompts_file)))
        prompts = {f"{prompts_file}, line {i}": s.rstrip("\r\n") for i, s in enumerate(lines, 1)}
        if not prompts:
            raise click.UsageError(f"{prompts_file} is empty.")
    elif prompt is not None:
        prompts = {"--prompt": prompt}
    else:
        piped = _piped_text()
        prompts = {"stdin": DEFAULT_PROMPT if piped is None else piped}
    for where, text in prompts.items():
        if not text:
            raise click.UsageError(f"{where}: the prompt is empty.")
    return list(prompts.values())


def _piped_text() -> str | None:
    """What stdin holds if it is a file or a pipe that is written to."""
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if stat.S_ISFIFO(mode):
        if not select.select([sys.stdin], [], [], STDIN_PATIENCE_SECONDS)[0]:
            click.echo("Nothing comes from stdin; taking the default prompt.", err=True)
            return None
    elif not stat.S_ISREG(mode):
        return None
    return _decode(sys.stdin.buffer.read(), "stdin")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}."
        ) from None


def _questions() -> Iterator[str]:
    """Lines that the user enters, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401, gives `input` its line editing
    while True:
        try:
            question = input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        if question.strip():
            yield question


def _echo_text(prompt: str, pieces: Iterable["Piece"]) -> None:
    """The prompt on stderr, so that stdout has what the model wrote and nothing else."""
    click.secho(prompt, nl=False, dim=True, err=True)
    try:
        for piece in pieces:
            click.echo(piece.text, nl=False)
    finally:
        click.echo()


def _echo_json_lines(prompts: list[str], pieces: Iterable["Piece"]) -> None:
    """A line for each prompt, in order, as soon as it and those before have ended."""
    results: list[dict[str, Any]] = [{"prompt": p, "text": "", "finish": None} for p in prompts]
    waiting = iter(results)
    result = next(waiting, None)
    try:
        for piece in pieces:
            results[piece.row]["text"] += piece.text
            results[piece.row]["finish"] = piece.finish
            while result and result["finish"]:
                click.echo(json.dumps(result, ensure_ascii=False))
                result = next(waiting, None)
    except KeyboardInterrupt:
        while result:
            click.echo(json.dumps(result, ensure_ascii=False))
            result = next(waiting, None)
        raise


class _Speed:
    """Tokens, and the seconds that passed until they came."""

    def __init__(self) -> None:
        self.num_tokens = self.num_timed = 0
        self.seconds = 0.0

    def watch(self, pieces: Iterable["Piece"]) -> Iterator["Piece"]:
        begin = time.perf_counter()
        for piece in pieces:
            self.num_tokens += len(piece.token_ids)
            if piece.timed:
                self.num_timed += len(piece.token_ids)
                self.seconds += time.perf_counter() - begin
            yield piece
            begin = time.perf_counter()

    def report(self) -> str:
        if not self.num_timed:
            return f"{self.num_tokens} tokens, all in the first chunk, which compiles"
        return (
            f"{self.num_tokens} tokens, {self.num_timed / self.seconds:.1f} tokens/s "
            "without prompts and the first chunk, which compiles"
        )
