"""Seconds until a decode step of the full-size model is ready to run, cold and warm.

Programs are compiled for shapes only, so that no weights have to fit; each in a process of its own,
the second one with what the first one left in the cache of programs.

python -m benchmarks.start_up
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

SIZES = ("flash", "pro")


def ready(size: str) -> dict[str, float]:
    """Imports, traces and compiles a step of one sequence with room for 8,192 tokens."""
    begin = time.perf_counter()
    import jax
    import jax.numpy as jnp

    from dsv4_jax.bench.random_model import first_layers, random_model
    from dsv4_jax.cache.schema import CacheSchema, new_arrays
    from dsv4_jax.compilation import cache_directory, compiler_options, keep_compiled_programs
    from dsv4_jax.config import Config
    from dsv4_jax.transformer import decode_step

    keep_compiled_programs(cache_directory())
    config = {"flash": Config.FLASH, "pro": Config.PRO}[size]
    config = first_layers(config, config.num_hidden_layers)
    jax.devices()
    times = {"import_s": time.perf_counter() - begin}
    made = []

    def params() -> Any:
        made.append(random_model(config))
        return made[-1].params

    shapes = jax.eval_shape(params)
    model = made[-1]
    schema = CacheSchema.of(config, model.numerics, model.dtype)
    arrays = jax.eval_shape(lambda: new_arrays(schema, 1, 64))

    begin = time.perf_counter()
    step = jax.jit(decode_step, donate_argnums=2, compiler_options=compiler_options())
    lowered = step.lower(model.graph, shapes, arrays, jax.ShapeDtypeStruct((1,), jnp.int32))
    times["trace_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    lowered.compile()
    return times | {"compile_s": time.perf_counter() - begin}


def main() -> None:
    from benchmarks.harness import write_results

    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as directory:
            for state in ("cold", "warm"):
                found = subprocess.run(
                    [sys.executable, "-m", "benchmarks.start_up", size],
                    env=os.environ | {"DSV4_CACHE_DIR": directory},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                times = json.loads(found.stdout.splitlines()[-1])
                rows.append({"model": size, "programs": state, **times})
                rows[-1]["all_s"] = sum(times.values())
    write_results("start-up", rows)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(ready(sys.argv[1])))
    else:
        main()
