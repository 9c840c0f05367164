"""The command `dsv4 bench`. Heavy imports are inside, so that help is quick."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dsv4_jax.bench.cost import Cost, Limits
    from dsv4_jax.bench.steps import Timing
    from dsv4_jax.model import Model

PRESETS = ("flash", "pro", "mini")

Command = Callable[..., Any]


@click.group()
def bench() -> None:
    """Time steps of a model with random weights, and compare with what the device can do."""


def _model_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option("--preset", type=click.Choice(PRESETS), default="flash"),
            click.option("--layers", type=int, help="The first so many.  [default: what fits]"),
            click.option("--batch", default=1, help="Sequences."),
            click.option(
                "--experts",
                type=click.Choice(["mxfp4", "nvfp4", "fp8", "bf16"]),
                default="mxfp4",
                help="Format of the routed experts.",
            ),
            click.option(
                "--linears",
                type=click.Choice(["fp8", "bf16"]),
                default="fp8",
                help="Format of the other packed matrices.",
            ),
            click.option("--kernels/--xla", default=True, help="With our kernels or XLA alone."),
            click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all."),
            click.option("--picture", type=click.Path(path_type=Path), help="Draw times, a PNG."),
        )
    ):
        command = option(command)
    return command


def _context(default: int) -> Callable[[Command], Command]:
    return click.option("--context", default=default, help="Tokens of each sequence before.")


_repeats = click.option("--repeats", default=20, help="Runs, of which the median is told.")


@bench.command()
@_model_options
@_context(8192)
@_repeats
@click.option("--steps", "num_steps", default=16, help="Steps of a program.")
def decode(num_steps: int, batch: int, context: int, repeats: int, **options: Any) -> None:
    """Steps of one token for each sequence."""

    def measure(setup: _Setup) -> Any:
        from dsv4_jax.bench.cost import step_cost
        from dsv4_jax.bench.steps import time_decode

        timing = time_decode(
            setup.model, batch=batch, context=context, num_steps=num_steps, repeats=repeats
        )
        return setup.report(timing, step_cost(setup.model, batch, 1, context), batch)

    what = f"decode, batch {batch}, 1 new token at {context:,}"
    _run(measure, what, batch, context + num_steps, batch, **options)


@bench.command()
@_model_options
@_context(0)
@_repeats
@click.option("--prompt", default=8192, help="New tokens of each sequence.")
@click.option("--chunk", default=2048, help="How many of them a program appends.")
def prefill(
    prompt: int, chunk: int, batch: int, context: int, repeats: int, **options: Any
) -> None:
    """Prompts, appended in chunks."""
    if prompt % chunk:
        raise click.UsageError(f"--prompt {prompt} is no multiple of --chunk {chunk}.")

    def measure(setup: _Setup) -> Any:
        from dsv4_jax.bench.cost import prompt_cost
        from dsv4_jax.bench.steps import time_prefill

        timing = time_prefill(
            setup.model, batch=batch, prompt=prompt, chunk=chunk, context=context, repeats=repeats
        )
        costs = prompt_cost(setup.model, batch, prompt, chunk, context)
        return setup.report(timing, costs, batch * prompt)

    what = f"prefill, batch {batch}, {prompt:,} new tokens at {context:,} in chunks of {chunk:,}"
    _run(measure, what, batch, context + prompt, batch * chunk, **options)


@bench.command()
@_model_options
@_context(8192)
@click.option("--operation", "chosen", multiple=True, help="Only this one; repeatable.")
def kernels(chosen: tuple[str, ...], batch: int, context: int, **options: Any) -> None:
    """Each operation of a decode step by itself, with the arguments that it has there.

    Without --layers, the first ones that have every kind of attention and routing.
    """

    def measure(setup: _Setup) -> Any:
        from dsv4_jax.bench.operations import Table

        return Table.measured(setup.title, setup.model, batch, context, setup.limits, chosen)

    what = f"operations of decode, batch {batch}, at {context:,}"
    _run(measure, what, batch, context + 1, batch, one_of_each=True, **options)


@dataclass(frozen=True)
class _Setup:
    """Some layers of a model on a device, and what is known of both."""

    title: str
    model: "Model"
    limits: "Limits | None"
    whole_layers: int

    def report(self, timing: "Timing", costs: "dict[str, Cost]", num_tokens: int) -> Any:
        """Of steps of so many tokens."""
        from dsv4_jax.bench.report import Report
        from dsv4_jax.memory import tree_bytes

        return Report(
            title=self.title,
            num_layers=self.model.config.num_hidden_layers,
            whole_layers=self.whole_layers,
            num_tokens=num_tokens,
            timing=timing,
            costs=costs,
            limits=self.limits,
            weight_bytes=tree_bytes(self.model.params),
        )


def _run(
    measure: Callable[[_Setup], Any],
    what: str,
    batch: int,
    num_tokens: int,
    num_rows: int,
    *,
    preset: str,
    layers: int | None,
    experts: str,
    linears: str,
    kernels: bool,
    json_file: Path | None,
    picture: Path | None,
    one_of_each: bool = False,
) -> None:
    """Plans for sequences and steps of so many tokens, makes the model, measures, reports."""
    from dsv4_jax.memory import use_all_memory_as_needed

    use_all_memory_as_needed()
    import jax

    from dsv4_jax.bench import cost, steps
    from dsv4_jax.bench.plan import Plan
    from dsv4_jax.bench.random_model import layers_of_each_kind, random_model
    from dsv4_jax.compilation import empty_program_cache
    from dsv4_jax.info import PRESETS as CONFIGS
    from dsv4_jax.kernels import Kernels

    try:
        steps.check_idle()
    except steps.BusyError as error:
        raise click.ClickException(str(error)) from None
    if layers is None and one_of_each:
        layers = layers_of_each_kind(CONFIGS[preset])
    whole = CONFIGS[preset]
    config = Plan(whole, experts, linears, batch, num_tokens, num_rows).config(layers)
    device = jax.devices()[0].device_kind
    title = (
        f"{preset}, {config.num_hidden_layers} layers: {what}; {experts} experts, {linears} "
        f"linears, {'kernels' if kernels else 'XLA'}, {device}"
    )
    with empty_program_cache():
        model = random_model(
            config,
            experts=experts,
            linears=linears,
            kernels=Kernels.FASTEST if kernels else Kernels.XLA,
        )
        limits = cost.LIMITS.get(device)
        report = measure(_Setup(title, model, limits, whole.num_hidden_layers))
    click.echo(report.render())
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    if picture is not None:
        try:
            report.draw(picture)
        except ImportError:
            raise click.UsageError("--picture needs matplotlib.") from None
