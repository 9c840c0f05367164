"""`Model`: a checkpoint with its tokenizer, and the checked way to run it."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from dsv4_jax.cache.manager import Cache
from dsv4_jax.cache.paged import BLOCK_TOKENS
from dsv4_jax.cache.schema import CacheSchema, new_arrays
from dsv4_jax.checkpoint.plan import Leaf
from dsv4_jax.checkpoint.read import read
from dsv4_jax.checkpoint.write import write
from dsv4_jax.compilation import Program
from dsv4_jax.config import Config
from dsv4_jax.kernels import Kernels
from dsv4_jax.layers.linear import Linear
from dsv4_jax.layers.norms import RMSNorm
from dsv4_jax.layers.router import Router
from dsv4_jax.memory import check_room, tree_bytes
from dsv4_jax.numerics import Numerics
from dsv4_jax.parallel.sharding import AXIS, check_mesh, param_sharding
from dsv4_jax.text.tokenizer import Tokenizer
from dsv4_jax.transformer import Capture, Transformer, decode_step, forward, prefill_step

MINI_DIRECTORY = Path(__file__).parent / "mini"

# Widths that prompts are cut into, so that few programs serve any length.
CHUNK_SIZES = (16, 256)

_forward = Program(forward, static_argnames="capture")
_prefill_step = Program(prefill_step, donate_argnums=2)
_decode_step = Program(decode_step, donate_argnums=2)


def _refuse_tracer(value: Any, method: str, pure: str) -> None:
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"Model.{method} checks its arguments on the host and cannot run under a JAX "
            f"transformation; use the pure function {pure} there"
        )


class Model:
    """Weights on devices, the compiled functions that use them, and the tokenizer.

    Attributes:
        config: sizes and constants.
        graph: the modules without their arrays (static), for the pure functions.
        params: the arrays, as the checkpoint stores them or, where kernels run, in their order.
        tokenizer: None when the checkpoint has none.
        numerics, dtype: quantisation points and compute dtype.
        kernels: which implementation of each operation runs.
        mesh: devices that share the arrays, or None.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        params: nnx.State,
        tokenizer: Tokenizer | None = None,
        mesh: jax.sharding.Mesh | None = None,
        tokenizer_file: Path | None = None,
    ):
        self.graph = graph
        self.params = params
        self.mesh = mesh
        self._tokenizer_file = tokenizer_file
        self.tokenizer = tokenizer
        modules = nnx.merge(graph, params)
        self.config: Config = modules.config
        self.numerics: Numerics = modules.numerics
        self.dtype: jnp.dtype = modules.dtype
        self.kernels: Kernels = modules.kernels
        self._is_stored = self.numerics.gate != "nvfp4" and not any(
            module.is_arranged
            for _, module in nnx.iter_modules(modules)
            if isinstance(module, Linear | RMSNorm)
        )

    def _check_ids(self, tokens: np.ndarray, lowest: int) -> None:
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens: got dtype {tokens.dtype}, expected integers")
        outside = (tokens < lowest) | (tokens >= self.config.vocab_size)
        if outside.any():
            raise ValueError(
                f"tokens: got id {tokens[outside][0]}, "
                f"expected ids in [{lowest}, {self.config.vocab_size})"
            )

    def forward(
        self, tokens: ArrayLike, capture: bool = False
    ) -> Float[Array, "b t v"] | tuple[Float[Array, "b t v"], Capture]:
        """Logits of whole sequences, see `dsv4_jax.forward`.

        Args:
            tokens: int32 [b, t], t >= 1, ids in [0, vocab_size).
            capture: also return hidden states, routing and selected entries.

        Returns:
            float32 [b, t, vocab_size], or (logits, Capture).

        Raises:
            ValueError: wrong rank, empty sequences or ids outside the vocabulary.
        """
        _refuse_tracer(tokens, "forward", "dsv4_jax.forward(model.graph, model.params, tokens)")
        ids = np.asarray(tokens)
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"tokens: got shape {ids.shape}, expected [batch, length >= 1]")
        self._check_ids(ids, 0)
        return _forward(self.graph, self.params, jnp.asarray(ids, jnp.int32), capture=capture)

    def new_cache(
        self,
        max_sequences: int = 1,
        max_tokens: int = 8192,
        cache_format: str | None = None,
    ) -> Cache:
        """An empty cache.

        Args:
            max_sequences: slots; all start admitted and empty.
            max_tokens: capacity over all sequences, rounded up to blocks of 128 tokens.
            cache_format: "records" (584-byte entries, MXFP4 keys) or "dense" (the model's dtype);
                by default what `numerics` rounds to.

        Raises:
            ValueError: a size below 1, an unknown format, one the model's sizes do not fit, or
                more than the device has room for; what steps need beside it is not counted.
        """
        for name, size in (("max_sequences", max_sequences), ("max_tokens", max_tokens)):
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected at least 1")
        num_blocks = -(-max_tokens // BLOCK_TOKENS)
        schema = CacheSchema.of(self.config, self.numerics, self.dtype, cache_format)
        self._check_room(schema, max_sequences, num_blocks)
        arrays = new_arrays(schema, max_sequences, num_blocks)
        if self.mesh is not None:
            everywhere = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
            arrays = jax.device_put(arrays, everywhere)
        return Cache(arrays, num_blocks)

    def _check_room(self, schema: CacheSchema, max_sequences: int, num_blocks: int) -> None:
        def needed(sequences: int, blocks: int) -> int:
            return tree_bytes(jax.eval_shape(partial(new_arrays, schema, sequences, blocks)))

        def would_fit(free: int) -> str:
            def of_sequences(sequences: int) -> int:
                return needed(sequences, -(-sequences * num_blocks // max_sequences))

            blocks = bisect_right(
                range(1, num_blocks + 1), free, key=partial(needed, max_sequences)
            )
            sequences = bisect_right(range(1, max_sequences + 1), free, key=of_sequences)
            return (
                f"{blocks * BLOCK_TOKENS:,} tokens for as many sequences, or {sequences} sequences "
                "with as many tokens each,"
            )

        check_room(
            f"caches of {max_sequences} sequences with {num_blocks * BLOCK_TOKENS:,} tokens",
            needed(max_sequences, num_blocks),
            would_fit,
            _devices(self.mesh),
        )

    def prefill(
        self, cache: Cache, tokens: ArrayLike, lengths: ArrayLike
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Appends a ragged batch of prompts; row i continues the sequence in slot i.

        The cache is updated in place and returned. Prompts are cut into a few chunk sizes, so
        calls of any length share compiled programs.

        Args:
            cache: from `new_cache`.
            tokens: int32 [b, t], b <= cache.max_sequences.
            lengths: int32 [b], 0 <= lengths <= t; 0 leaves a slot as it is.

        Returns:
            (logits at each row's last token, float32 [b, vocab_size], zero for length 0; cache)

        Raises:
            ValueError: wrong shapes, lengths or ids.
            OutOfBlocksError: the cache cannot hold the new tokens; it is left as it was.
        """
        _refuse_tracer(tokens, "prefill", "dsv4_jax.prefill_step")
        ids, counts = np.asarray(tokens), np.asarray(lengths)
        if ids.ndim != 2:
            raise ValueError(f"tokens: got shape {ids.shape}, expected [batch, length]")
        b, t = ids.shape
        if not 1 <= b <= cache.max_sequences:
            raise ValueError(f"tokens: got {b} rows, expected 1 to {cache.max_sequences} (slots)")
        if counts.shape != (b,) or not np.issubdtype(counts.dtype, np.integer):
            raise ValueError(
                f"lengths: got {counts.dtype}{list(counts.shape)}, expected integers [{b}]"
            )
        if (counts < 0).any() or (counts > t).any():
            raise ValueError(f"lengths: got {counts.tolist()}, expected values in [0, {t}]")
        counted = np.arange(t) < counts[:, None]
        self._check_ids(np.where(counted, ids, 0), 0)
        ids = np.where(counted, ids, -1)

        cache.prepare_step(self._per_slot(cache, counts))
        logits = jnp.zeros((b, self.config.vocab_size), jnp.float32)
        for begin, size in _chunks(int(counts.max(initial=0))):
            chunk = np.full((b, size), -1, np.int32)
            part = ids[:, begin : begin + size]
            chunk[:, : part.shape[1]] = part
            chunk_counts = np.clip(counts - begin, 0, size).astype(np.int32)
            new = self._run(cache, _prefill_step, jnp.asarray(chunk), jnp.asarray(chunk_counts))
            logits = jnp.where(chunk_counts[:, None] > 0, new, logits)
            cache.advance(self._per_slot(cache, chunk_counts))
        return logits, cache

    def decode_step(self, cache: Cache, tokens: ArrayLike) -> tuple[Float[Array, "b v"], Cache]:
        """Appends one token to each sequence and returns the logits of the next.

        Args:
            cache: from `new_cache`, updated in place.
            tokens: int32 [b], b <= cache.max_sequences, row i for slot i; -1 leaves a slot byte
                for byte as it is.

        Returns:
            (float32 [b, vocab_size], undefined where the token is -1; cache)

        Raises:
            ValueError: wrong shape or ids, or a token for an empty slot.
            OutOfBlocksError: the cache cannot hold the new tokens; it is left as it was.
        """
        _refuse_tracer(tokens, "decode_step", "dsv4_jax.decode_step")
        ids = np.asarray(tokens)
        if ids.ndim != 1 or not 1 <= len(ids) <= cache.max_sequences:
            raise ValueError(
                f"tokens: got shape {ids.shape}, expected [b] with 1 <= b <= {cache.max_sequences}"
            )
        self._check_ids(ids, -1)
        empty = (ids >= 0) & (cache.lengths[: len(ids)] == 0)
        if empty.any():
            raise ValueError(
                f"tokens: slot {int(np.argmax(empty))} is empty; prefill a prompt before decoding"
            )
        counts = self._per_slot(cache, ids >= 0)
        cache.prepare_step(counts)
        logits = self._run(cache, _decode_step, jnp.asarray(ids, jnp.int32))
        cache.advance(counts)
        return logits, cache

    @staticmethod
    def _per_slot(cache: Cache, counts: np.ndarray) -> np.ndarray:
        full = np.zeros(cache.max_sequences, np.int64)
        full[: len(counts)] = counts
        return full

    def _run(self, cache: Cache, step: Any, *args: Array) -> Array:
        """Runs a jitted pure step with the cache's arrays donated."""
        try:
            logits, arrays = step(self.graph, self.params, cache.arrays, *args)
        except Exception as error:
            cache.mark_unusable(f"a step failed after its arrays were given away: {error}")
            raise
        cache.replace_arrays(arrays)
        return logits

    def save(self, directory: str | Path) -> None:
        """Writes the model in the official format; `load` gives the same bits back.

        Args:
            directory: absent or empty.

        Raises:
            ValueError: the directory is not empty, or the weights are in the order of kernels.
        """
        self.check_stored("save")
        flat = nnx.to_flat_state(self.params)
        params: dict[tuple[Any, ...], Array] = {path: variable[...] for path, variable in flat}
        write(directory, self.config, params, tokenizer_file=self._tokenizer_file)

    def check_stored(self, purpose: str) -> None:
        """ValueError unless the weights are as a checkpoint stores them."""
        if not self._is_stored:
            raise ValueError(
                "kernels: weights are in the order of kernels, or gates are quantised; load with "
                f"kernels=Kernels.XLA and the gates as stored to {purpose}"
            )

    def generate(self, prompt: str, **options: Any) -> str:
        """The continuation of a prompt; see `generate_stream`."""
        return "".join(self.generate_stream(prompt, **options))

    def generate_stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Yields the continuation of a prompt in pieces of whole characters.

        Args:
            prompt: text; special-token strings in it are plain text.
            options: fields of `SamplingParams`: max_new_tokens, temperature, top_k, top_p, min_p,
                seed, stop, stop_token_ids.

        Raises:
            ValueError: an empty prompt, a model without tokenizer, or a bad option.
        """
        from dsv4_jax.decoding.generate import stream_text

        if not prompt:
            raise ValueError("prompt: got an empty string, expected some text")
        return stream_text(self, prompt, **options)


def load(
    source: str | Path = "mini",
    *,
    dtype: DTypeLike | None = None,
    numerics: Numerics = Numerics.CHECKPOINT,
    mesh: jax.sharding.Mesh | None = None,
    kernels: Kernels = Kernels.FASTEST,
    progress: bool = False,
) -> Model:
    """Reads a checkpoint onto the devices.

    Args:
        source: a directory with config.json and safetensors files, or "mini", the bundled model.
            Without a tokenizer.json in it, `model.tokenizer` is None.
        dtype: compute dtype, bfloat16 or float32; by default the config's torch_dtype, on a CPU,
            where bfloat16 is slower, float32. Weights keep the dtype they are stored in.
        numerics: where the forward pass rounds.
        mesh: devices to spread the weights over, with an automatic axis named "model".
        kernels: which implementation of each operation runs. Where "gemm" and "experts" run on
            kernels (by default if these are there and `dtype` is bfloat16), weights are put into
            their order, and the model cannot be saved.
        progress: draw a progress bar on stderr.

    Raises:
        ValueError: no such directory, a bad config, dtype or mesh, kernels over a mesh, or no room
            for the weights in the share of the memory that JAX was configured with.
        CheckpointError: a ValueError that lists everything that is wrong with the tensors.
    """
    directory = MINI_DIRECTORY if source == "mini" else Path(source)
    if not directory.is_dir():
        raise ValueError(f"source: got {str(source)!r}, expected 'mini' or an existing directory")
    config = Config.from_json(directory)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else config.torch_dtype
    compute_dtype = jnp.dtype(dtype)
    if compute_dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"dtype: got {compute_dtype}, expected bfloat16 or float32")
    if mesh is not None:
        check_mesh(mesh)
        if "ffi" in (kernels.implementation(name, ("ffi",)) for name in ("gemm", "experts")):
            raise ValueError(f"kernels: got {kernels} with a mesh; these run on one device")

    def place(path: tuple[str | int, ...], array: np.ndarray) -> Array:
        return jax.device_put(array, mesh and param_sharding(mesh, path, array.shape))

    def check(leaves: Sequence[Leaf]) -> None:
        check_weights(leaves, mesh)

    checkpoint = read(directory, config, place=place, check=check, progress=progress)
    if not checkpoint.has_mtp:
        config = replace(config, num_nextn_predict_layers=0)
    arrays: dict[tuple[Any, ...], Array] = dict(checkpoint.params)
    formats = checkpoint.weight_formats
    del checkpoint
    graph, params = assemble(config, arrays, formats, compute_dtype, numerics, kernels, mesh)
    tokenizer_file = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(tokenizer_file) if tokenizer_file.exists() else None
    return Model(graph, params, tokenizer, mesh, tokenizer_file if tokenizer else None)


def check_weights(leaves: Sequence[Leaf], mesh: jax.sharding.Mesh | None) -> None:
    """Raises ValueError unless each device has room for its share of the weights.

    One of them is there twice for a while, stored and in the order of kernels.
    """
    sizes = []
    for leaf in leaves:
        sharding = mesh and param_sharding(mesh, leaf.part.path, leaf.shape)
        shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
        sizes.append(math.prod(shape) * leaf.dtype.itemsize)
    num_devices = 1 if mesh is None else mesh.shape[AXIS]

    def would_fit(free: int) -> str:
        return f"at least {-(-num_devices * sum(sizes) // max(free, 1))} such devices in a mesh"

    num_bytes = sum(sizes) + max(sizes)
    check_room("weights on each device", num_bytes, would_fit, _devices(mesh))


def _devices(mesh: jax.sharding.Mesh | None) -> list[jax.Device] | None:
    return None if mesh is None else list(mesh.local_devices)


def assemble(
    config: Config,
    arrays: dict[tuple[Any, ...], Array],
    weight_formats: Mapping[tuple[Any, ...], str],
    dtype: DTypeLike,
    numerics: Numerics,
    kernels: Kernels,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """A model of arrays as a checkpoint stores them.

    Args:
        config: its sizes.
        arrays: every parameter by its path. They are taken out, so that each is freed once it is
            in the order of kernels.
        weight_formats: of each linear that may be packed, by path.
        dtype, numerics, kernels, mesh: as for `load`.

    Returns:
        (graph, params)
    """
    modules = Transformer(config, dtype, numerics, kernels)
    for path, module in nnx.iter_modules(modules):
        if isinstance(module, Linear) and path in weight_formats:
            module.repack(weight_formats[path])
    graph, declared = nnx.split(modules)
    flat = nnx.to_flat_state(declared)
    params = nnx.from_flat_state([(path, v.replace(arrays.pop(path))) for path, v in flat])
    modules = nnx.merge(graph, params)
    del params
    for _, module in nnx.iter_modules(modules):
        if isinstance(module, Linear | RMSNorm) and mesh is None:
            module.arrange(kernels, dtype)
        elif isinstance(module, Router) and numerics.gate == "nvfp4":
            module.quantize_gate()
    return nnx.split(modules)


def _chunks(num_tokens: int) -> Iterator[tuple[int, int]]:
    """(begin, size) of the chunks that cover a prompt: large ones, then one that fits the rest."""
    begin = 0
    while begin < num_tokens:
        rest = num_tokens - begin
        size = next((s for s in CHUNK_SIZES if s >= rest), CHUNK_SIZES[-1])
        yield begin, size
        begin += size
