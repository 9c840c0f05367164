"""Calls that launch every kernel on small shapes, by subject, as thunks of public operations."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import dsv4_ffi
from dsv4_jax.formats import coded_inputs, tiled
from dsv4_jax.ops import experts
from dsv4_jax.ops.coded_gemm import coded_gemm
from dsv4_jax.ops.dense_router import dense_router
from dsv4_jax.ops.gemm import Segment, gemm, grouped_gemm, projections
from dsv4_jax.ops.grouped import route_plan
from dsv4_jax.ops.hash_router import hash_router
from dsv4_jax.ops.hyper_connections import hc_post, hc_post_pre, hc_pre
from dsv4_jax.ops.indexer import paged_indexer_scores
from dsv4_jax.ops.norm_quantize import rms_norm_quantize
from dsv4_jax.ops.norms import rms_norm
from dsv4_jax.ops.nvfp4_gemm import nvfp4_gemm, nvfp4_grouped_gemm
from dsv4_jax.ops.quantize import nvfp4_quantize
from dsv4_jax.ops.router import activation_topk
from dsv4_jax.ops.topk import topk_select
from tests import test_experts_op as experts_cases
from tests import test_ops_append_swa as swa
from tests import test_ops_flush as flush
from tests import test_ops_gather_kv as gather
from tests import test_ops_hash_router as hash_routes
from tests import test_ops_hyper_connections as hyper
from tests import test_ops_indexer as indexer
from tests import test_ops_indexer_queries as queries
from tests import test_ops_layer_writes as writes
from tests import test_ops_nvfp4_gemm as nvfp4
from tests import test_ops_router as routes
from tests import test_ops_sparse_attention as attention
from tests.attention_cases import full_size, written
from tests.cache_cases import DENSE, DENSE_KEY, KEY_RECORD, random_table
from tests.packed_weights import tile, weight_arrays
from tests.ptx.nvfp4_gemm import random_problem

Call = Callable[[], Any]
Cases = Callable[[], Iterator[Call]]

# The library's calls that a subject's cases make, and the cases.
SUBJECTS: dict[str, tuple[set[str], Cases]] = {}
STORAGES = {
    "dense": (DENSE, DENSE_KEY),
    "record": (gather.STORAGES["record"], KEY_RECORD),
    "float-scale": (gather.STORAGES["float-scale"], KEY_RECORD),
}


def subject(*calls: str) -> Callable[[Cases], Cases]:
    def add(cases: Cases) -> Cases:
        SUBJECTS[cases.__name__] = set(calls), cases
        return cases

    return add


def kernel(operation: Callable[..., Any], *arguments: Any, **static: Any) -> Call:
    def on_device(x: Any) -> Any:
        return jnp.asarray(x) if isinstance(x, np.ndarray) else x

    arguments, static = jax.tree.map(on_device, (arguments, static))
    return partial(operation, *arguments, **static, implementation="ffi")


def bfloat16(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(ml_dtypes.bfloat16)


def float32(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weight(weight_format: str, *shape: int) -> tiled.TiledWeight:
    return tile(weight_format, weight_arrays(weight_format, shape, spread=3)[0])


@subject("gemm")
def gemm_of_few_rows() -> Iterator[Call]:
    """Ragged outputs and inputs."""
    for weight_format, num_rows in itertools.product(tiled.FORMATS, (1, 3, 16)):
        w = weight(weight_format, 72, 552)
        for round_input in (False, True):
            yield kernel(gemm, bfloat16(num_rows, 552), w, round_input=round_input)
    for num_rows in (1, 2, 20):
        yield kernel(grouped_gemm, bfloat16(num_rows, 2, 256), weight("fp8_block", 256, 256))


@subject("gemm")
def gemm_of_segments() -> Iterator[Call]:
    fp8, bf16 = weight("fp8_block", 136, 512), weight("bf16", 72, 512)
    two = [Segment(fp8, True, jnp.float32), Segment(bf16, False, jnp.float32)]
    four = [*two, Segment(weight("mxfp4", 64, 512), True), Segment(weight("nvfp4", 64, 512))]
    for num_rows, segments in itertools.product((1, 5, 16, 40), (two, four)):
        yield kernel(projections, bfloat16(num_rows, 512), segments)


@subject("gemm")
def gemm_of_many_rows() -> Iterator[Call]:
    """As many outputs as make each size of a tile the fastest; inputs that reuse the ring."""
    for weight_format in tiled.FORMATS:
        long, wide = weight(weight_format, 64, 9304), weight(weight_format, 12800, 32)
        yield kernel(gemm, bfloat16(17, 9304), long)
        for num_rows, round_input in itertools.product((64, 128, 256), (False, True)):
            yield kernel(gemm, bfloat16(num_rows, 32), wide, round_input=round_input)


@subject("coded_gemm")
def gemm_of_codes() -> Iterator[Call]:
    for weight_format in ("fp8_block", "mxfp4"):
        long, wide = weight(weight_format, 64, 9344), weight(weight_format, 12800, 32)
        for w, num_rows in [(long, 65), (wide, 128), (wide, 256)]:
            coded = jax.jit(coded_inputs.encode)(bfloat16(num_rows, w.shape[1]))
            yield kernel(coded_gemm, coded, w)


@subject("moe_ffn")
def moe() -> Iterator[Call]:
    """Few routes, few rows of each expert, many; inputs that reuse the rings."""
    for weight_format in experts_cases.PACKED:
        model = experts_cases.experts_of(weight_format, 2, 2560, 512)
        shapes = ((2, 2), (17, 1), (12, 2))
        for (num_tokens, top_k), round_input in itertools.product(shapes, (False, True)):
            x, valid = model.inputs(num_tokens), np.arange(num_tokens) % 3 != 1
            arguments = (x, *model.routes(num_tokens, top_k), valid, *model.tiled)
            static = {"limit": experts_cases.LIMIT, "round_input": round_input}
            yield kernel(experts.routed_experts, *arguments, **static)
    for weight_format in ("mxfp4", "nvfp4"):
        model = experts_cases.experts_of(weight_format, 4, 256, 256)
        shared = jax.tree.map(lambda a: a[0], experts_cases.experts_of("fp8_block", 1).tiled)
        arguments = (model.inputs(3), *model.routes(3, 3), np.ones(3, bool))
        experts_and_shared = tuple(model.tiled), tuple(shared)
        yield kernel(experts.experts_with_shared, *arguments, *experts_and_shared, **static)


@subject("grouped_gemm", "route_plan")
def grouped_rows() -> Iterator[Call]:
    for weight_format in experts_cases.PACKED:
        for sizes in ((5, 0, 9), (0, 200)):
            x, group_sizes, w, _ = experts_cases.sorted_case(weight_format, sizes, 256, 256, True)
            yield kernel(experts.sorted_gemm, x, group_sizes, w, round_input=True)
    ids, valid = routes_of(40, 6, 20)
    yield kernel(route_plan, ids, valid, 20, 8)


def routes_of(num_tokens: int, top_k: int, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, num_experts, num_tokens * top_k).astype(np.int32)
    return ids, rng.random(num_tokens) < 0.8


@subject("sparse_attention")
def sparse_attention() -> Iterator[Call]:
    """Window, sparse and dense entries; one block or several for a query, few splits or many; and
    many tokens."""
    shapes: list[tuple[list[int], dict[str, Any]]] = [
        ([5, 300], {"heads": 64}),
        ([40], {"heads": 128}),
        ([700, 90], {"heads": 128, "ratio": 4, "top_k": 200}),
        ([3000, 126], {"heads": 64, "ratio": 128}),
        ([60000], {"heads": 64, "ratio": 128}),
        ([1020, 2, 600], {"heads": 40, "ratio": 4, "top_k": 64, "t": 4, "length": [4, 2, 0]}),
        ([1020, 125], {"heads": 3, "ratio": 128, "t": 5, "ring": 132}),
        ([100] * 70, {"heads": 8}),
        ([5, 300], {"heads": 8, "ratio": 4, "top_k": 130, "t": 70}),
        ([200], {"heads": 70, "ratio": 128, "t": 64}),
    ]
    for start, options in shapes:
        case = full_size(np.random.default_rng(0), start, **options)
        yield partial(attention.run, case, "ffi", jnp.bfloat16)
        if options.get("t", 1) == 1 or "ring" in options:
            yield partial(attention.run, written(case), "ffi", jnp.bfloat16, batch_invariant=True)


@subject("topk_select")
def top_k() -> Iterator[Call]:
    """Rows of a warp, of a block, of a cluster's registers, and streamed ones."""
    sizes = [((3, 200), 16), ((3, 500), 16), ((2, 5000), 512), ((2, 20000), 512)]
    sizes += [((50, 17000), 64), ((133, 8200), 64), ((70, 33000), 64), ((1, 70000), 512)]
    for (shape, k), in_order in itertools.product(sizes, (False, True)):
        lengths = np.random.default_rng(0).integers(k // 2, shape[1], shape[0]).astype(np.int32)
        select = topk_select if in_order else unordered_topk
        yield kernel(select, float32(*shape), k, lengths=lengths, sorted=in_order)


def unordered_topk(*arguments: Any, **options: Any) -> jax.Array:
    return jnp.sort(topk_select(*arguments, **options)[1])


@subject("activation_topk", "dense_router", "hash_router")
def router() -> Iterator[Call]:
    for num_experts, k in itertools.product((20, 256, 300, 384, 1000), (6, 8)):
        logits, bias = float32(9, num_experts), float32(num_experts, seed=1)
        yield kernel(activation_topk, logits, bias, k, 2.5)
    for num_experts, num_tokens in itertools.product((20, 256, 384), (1, 16, 33, 512)):
        x, gate, bias = routes.tokens_and_gate(num_tokens, num_experts, 512)
        yield kernel(dense_router, x, gate, bias, 6, 2.5)
        if num_tokens <= 64:
            yield kernel(dense_router, x, routes.nvfp4_gate(gate), bias, 6, 2.5)
    token_ids, table, x, gate = hash_routes.inputs(5)
    for packed in (gate, routes.nvfp4_gate(gate)):
        yield kernel(hash_router, token_ids, table, scale=1.5, x=x, gate=packed)


@subject("hc_pre", "hc_post", "hc_post_pre")
def hyper_connections() -> Iterator[Call]:
    for num_tokens in (1, 67, 600):
        spread, gates = hyper.random_spread(num_tokens, 256), hyper.random_gates(256)
        yield kernel(hc_post_pre, *spread, gates, **hyper.STATIC)
        yield kernel(hc_pre, spread[1], gates, **hyper.STATIC)
        yield kernel(hc_post, *spread)


@subject("rms_norm", "rms_norm_quantize")
def norms() -> Iterator[Call]:
    yield kernel(rms_norm, bfloat16(5, 1000), float32(1000), 1e-6)
    yield kernel(rms_norm_quantize, bfloat16(20, 384), float32(384), 1e-6)


@subject("nvfp4_quantize")
def quantize() -> Iterator[Call]:
    """A block, a cluster and a grid to a scale; a group to a thread or several."""
    for dtype in (np.float32, ml_dtypes.bfloat16):
        for shape, per_row in [
            *(((130, 1040), True), ((2, 16400), True)),
            *(((17, 64), False), ((16, 16384), False), ((130, 16384), False)),
        ]:
            yield kernel(nvfp4_quantize, float32(*shape).astype(dtype), per_row)


@subject("nvfp4_gemm", "nvfp4_grouped_gemm")
def nvfp4_products() -> Iterator[Call]:
    for sizes in (None, [3, 0, 60, 2]):
        problem = random_problem(65, 130, 320, sizes)
        tokens, weights = nvfp4.operands(problem)
        if sizes is None:
            yield kernel(nvfp4_gemm, tokens, weights)
        else:
            yield kernel(nvfp4_grouped_gemm, tokens, weights, np.array(sizes, np.int32))


@subject("indexer_scores", "indexer_queries")
def indexer_scores() -> Iterator[Call]:
    rng = np.random.default_rng(0)
    for key_format, mxfp4_queries in [(f, m) for f in indexer.FORMATS for m in (False, True)]:
        for b, t, blocks_each in [(1, 1, 40), (3, 2, 5)]:
            case = indexer.make_case(rng, key_format, b, t, blocks_each)
            arguments = indexer.arguments(case, jnp.bfloat16)
            yield kernel(visible_scores, *arguments, mxfp4_queries=mxfp4_queries)
    arguments = (*queries.projected(3, 2), queries.FREQUENCIES)
    yield kernel(queries.indexer_queries, *arguments, scale=queries.SCALE)


def visible_scores(*arguments: Any, **options: Any) -> jax.Array:
    """Without those of entries that a query does not see, which are anything."""
    scores = paged_indexer_scores(*arguments, **options)
    lengths = arguments[-1]
    return jnp.where(jnp.arange(scores.shape[-1]) < lengths[..., None], scores, 0)


@subject("append_swa", "flush_csa", "flush_hca", "gather_kv")
def cache_writes() -> Iterator[Call]:
    """A head to a warp or two; one token or a chunk, that ends sequences' blocks and does not."""
    for storage, _ in STORAGES.values():
        for case in (
            swa.Case([0, 126, 3_000_000], [5, 3, 0], 5, heads=3),
            swa.Case([0, 126], [70, 70], 70, heads=64),
        ):
            yield partial(case.run, "ffi", storage, case.ring(storage))
    for storages, ratio in itertools.product(STORAGES.values(), (4, 128)):
        of_streams = storages[: 2 if ratio == 4 else 1]
        for width in (1, 9, 130):
            case = flush.Case(ratio, [0, 125], width)
            yield partial(case.flush, "ffi", of_streams, case.state(of_streams), 0, width)
    rng = np.random.default_rng(0)
    for storage in gather.STORAGES.values():
        table, ids = random_table(rng, 2, 4, 15), rng.integers(-1, 128, (2, 7)).astype(np.int32)
        planes = gather.pool(rng, storage, 15)
        yield kernel(gather.gather, planes, 1, table, ids, storage=storage)


@subject("layer_writes")
def layer_writes() -> Iterator[Call]:
    for storages, ratio in itertools.product(STORAGES.values(), (4, 128)):
        few = writes.Case(ratio, [0, 3, 126, 1_021], [4, 2, 3, 0], 4, storages)
        many = writes.Case(ratio, list(range(9)), [4] * 9, 4, storages)
        yield partial(few.run, "ffi")
        yield partial(many.run, "ffi", queries=False)


@subject("timestamp")
def clock() -> Iterator[Call]:
    def ticks() -> jax.Array:
        """Only whether there is a time, which is never the same."""
        earlier = jnp.zeros(2, jnp.uint32)
        return dsv4_ffi.call("timestamp", jax.ShapeDtypeStruct((2,), jnp.uint32), earlier).any()

    yield ticks
