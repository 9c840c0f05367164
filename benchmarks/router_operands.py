"""How often an expert changes on the mini model when the gate's operands are rounded.

In float32 the reference multiplies float32 activations by the stored gate. Rounded to bfloat16, or
with the gate packed as NVFP4, logits move, and where two experts were close another is chosen. A
model that computes in bfloat16 has bfloat16 activations and a bfloat16 gate: there is nothing to
round, and nothing changes.

python -m benchmarks.router_operands
"""

import inspect
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import dsv4_jax
from benchmarks.harness import Row, write_results
from dsv4_jax.formats import nvfp4
from dsv4_jax.layers.router import Router
from dsv4_jax.ops.dense_router import Gate, Nvfp4Gate, dense_router

NUM_TOKENS = 2048


def dense_routers(tokens: jax.Array) -> list[tuple[Router, jax.Array]]:
    """The routers that score, with the float32 activations [T, d] that reach them."""
    model = dsv4_jax.load("mini", dtype=jnp.float32)
    seen = []
    routed = Router.__call__

    def record(self: Router, x: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.mode == "dense":
            seen.append((self, x[0]))
        return routed(self, x, token_ids)

    with mock.patch.object(Router, "__call__", record):
        dsv4_jax.forward(model.graph, model.params, tokens)
    return seen


def changes(ids: jax.Array, reference: jax.Array) -> Row:
    """Of all tokens those with another set of experts; of all choices those that are new."""
    new = ~(ids[:, :, None] == reference[:, None, :]).any(-1)
    return {
        "tokens_changed": float(new.any(-1).mean()),
        "choices_changed": float(new.mean()),
    }


def main() -> None:
    tokenizer = dsv4_jax.load("mini").tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode(inspect.getsource(json.decoder) * 4)[:NUM_TOKENS]
    rows: list[Row] = []
    for layer, (router, x) in enumerate(dense_routers(jnp.asarray(np.array([tokens])))):
        weight, bias = router.weight[...], router.bias[...]

        def ids(x: jax.Array, gate: Gate, router: Router = router, bias: jax.Array = bias):
            return dense_router(x, gate, bias, router.top_k, router.scale)[1]

        rounded = x.astype(jnp.bfloat16)
        packed = Nvfp4Gate(*nvfp4.quantize(weight.astype(jnp.bfloat16)))
        reference = ids(x, weight)
        for name, other in (
            ("bfloat16", ids(rounded, weight.astype(jnp.bfloat16))),
            ("nvfp4", ids(rounded, packed)),
        ):
            row = {"dense_router": layer, "gate": str(weight.dtype), "operands": name}
            rows.append({**row, "tokens": len(tokens), **changes(other, reference)})
    write_results("router-operands", rows)


if __name__ == "__main__":
    main()
