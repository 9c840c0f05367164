"""The command `dsv4 bench`. Heavy imports are inside, so that help is quick."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

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
            click.option("--context", default=8192, help="Tokens of each before the step."),
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
            click.option("--repeats", default=20, help="Runs, of which the median is told."),
            click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all."),
            click.option("--picture", type=click.Path(path_type=Path), help="Draw parts, a PNG."),
        )
    ):
        command = option(command)
    return command


@bench.command()
@_model_options
@click.option("--steps", "num_steps", default=16, help="Steps of a program.")
def decode(num_steps: int, batch: int, context: int, repeats: int, **options: Any) -> None:
    """Steps of one token for each sequence."""

    def measure(model: Any) -> Any:
        from dsv4_jax.bench.steps import time_decode

        return time_decode(
            model, batch=batch, context=context, num_steps=num_steps, repeats=repeats
        )

    _run(measure, "decode", batch, 1, context, num_steps, **options)


@bench.command()
@_model_options
@click.option("--chunk", default=2048, help="New tokens of each sequence in a step.")
def prefill(chunk: int, batch: int, context: int, repeats: int, **options: Any) -> None:
    """Steps of many tokens for each sequence."""

    def measure(model: Any) -> Any:
        from dsv4_jax.bench.steps import time_prefill

        return time_prefill(model, batch=batch, chunk=chunk, context=context, repeats=repeats)

    _run(measure, "prefill", batch, chunk, context, 1, **options)


def _run(
    measure: Callable[[Any], Any],
    name: str,
    batch: int,
    num_tokens: int,
    context: int,
    num_steps: int,
    *,
    preset: str,
    layers: int | None,
    experts: str,
    linears: str,
    kernels: bool,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    from dsv4_jax.memory import use_all_memory_as_needed

    use_all_memory_as_needed()
    import jax

    from dsv4_jax.bench import cost, random_model, steps
    from dsv4_jax.bench.plan import Plan
    from dsv4_jax.bench.report import Report
    from dsv4_jax.cache.schema import CacheSchema
    from dsv4_jax.compilation import empty_program_cache
    from dsv4_jax.info import PRESETS as CONFIGS
    from dsv4_jax.kernels import Kernels

    try:
        steps.check_idle()
    except steps.BusyError as error:
        raise click.ClickException(str(error)) from None
    plan = Plan(CONFIGS[preset], experts, linears, batch, context + num_tokens * num_steps)
    config = plan.config(layers)
    device = jax.devices()[0]
    with empty_program_cache():
        model = random_model.random_model(
            config,
            experts=experts,
            linears=linears,
            kernels=Kernels.FASTEST if kernels else Kernels.XLA,
        )
        timing = measure(model)
    schema = CacheSchema.of(config, model.numerics, model.dtype, None)
    report = Report(
        title=f"{name}: {preset}, {config.num_hidden_layers} layers, batch {batch}, "
        f"{num_tokens} new tokens at {context:,}, {experts} experts, {linears} linears, "
        f"{'kernels' if kernels else 'XLA'}, {device.device_kind}",
        num_layers=config.num_hidden_layers,
        num_tokens=batch * num_tokens,
        step_us=timing.step_us,
        costs=cost.step_cost(model, batch, num_tokens, context, schema.entries, schema.keys),
        limits=cost.LIMITS.get(device.device_kind),
        part_us=timing.profile and {p: us / num_steps for p, us in timing.profile.part_us.items()},
        launches=timing.profile
        and (timing.profile.num_kernels / num_steps, timing.profile.num_graphs / num_steps),
        compile_s=timing.compile_s,
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        cache_bytes=timing.cache_bytes,
        peak_bytes=timing.peak_bytes,
    )
    click.echo(report.render())
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    if picture is not None:
        try:
            report.draw(picture)
        except ImportError:
            raise click.UsageError("--picture needs matplotlib.") from None
