"""Prompts to continuations: slots, chunks of decode steps, and what ends a sequence.

A sequence's tokens depend on its own prompt and options only: every program has the same shape
however many prompts there are, and prompts that need caches of different size never share one.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache.manager import Cache
from dsv4_jax.compilation import Program
from dsv4_jax.decoding.loop import decode_chunk
from dsv4_jax.decoding.sampling import SamplingArrays, SamplingParams, sample
from dsv4_jax.model import CHUNK_SIZES, Model
from dsv4_jax.text.stream import Detokenizer, StopStrings
from dsv4_jax.text.tokenizer import Tokenizer

CHUNK_STEPS = 8
# Tokens of all slots together above which a sequence shares its cache with fewer others.
SHARED_TOKENS = 65536
MIN_CAPACITY = 256
STOP_IDS_PADDING = 8

_decode_chunk = Program(decode_chunk, static_argnames="num_steps", donate_argnames="arrays")
_sample = Program(sample)


class Piece(NamedTuple):
    """A step of one continuation.

    Attributes:
        row: index of the prompt.
        token_ids: the new token; none where a stop token or string ended the sequence. A token
            that completes a stop string is one.
        text: characters that are now complete and part of the continuation; "" without tokenizer.
        finish: what ended the continuation with this piece, if anything: "stop" (token or string)
            or "length" (max_new_tokens).
        timed: the token came out of a chunk of decode steps that was compiled before.
    """

    row: int
    token_ids: tuple[int, ...]
    text: str
    finish: Literal["stop", "length"] | None
    timed: bool


class _Sequence:
    """One prompt and what has been generated for it."""

    def __init__(
        self,
        row: int,
        prompt: np.ndarray,
        params: SamplingParams,
        eos_id: int,
        tokenizer: Tokenizer | None,
    ):
        self.row = row
        self.prompt = prompt
        self.params = params
        self.stop_ids = (eos_id, *params.stop_token_ids)
        self.num_new = 0
        self.newest = -1
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop_strings = StopStrings(params.stop)

    @property
    def capacity(self) -> int:
        """Tokens that its cache holds: a power of two, so that few programs are compiled."""
        needed = len(self.prompt) + self.params.max_new_tokens
        return max(MIN_CAPACITY, 1 << (needed - 1).bit_length())

    def push(self, token_id: int, timed: bool) -> Piece:
        """Takes the next token."""
        if token_id in self.stop_ids:
            return Piece(self.row, (), self._last_text(), "stop", timed)
        self.newest = token_id
        self.num_new += 1
        text = self._stop_strings.push(self._text_of(token_id))
        finish: Literal["stop", "length"] | None = None
        if not self._stop_strings.stopped and self.num_new == self.params.max_new_tokens:
            text += self._last_text()
            finish = "length"
        if self._stop_strings.stopped:
            finish = "stop"
        return Piece(self.row, (token_id,), text, finish, timed)

    def _text_of(self, token_id: int) -> str:
        if self._detokenizer is None:
            return ""
        try:
            return self._detokenizer.push([token_id])
        except ValueError:  # a model may have ids beyond its tokenizer's
            return self._detokenizer.flush() + "\N{REPLACEMENT CHARACTER}"

    def _last_text(self) -> str:
        rest = "" if self._detokenizer is None else self._detokenizer.flush()
        return self._stop_strings.push(rest) + self._stop_strings.flush()


def generate(
    model: Model,
    prompts: Sequence[Sequence[int] | np.ndarray],
    params: SamplingParams | Sequence[SamplingParams],
) -> Iterator[Piece]:
    """Continues prompts, several at a time; what is given is checked before anything runs.

    Args:
        model: to run.
        prompts: token ids, at least one each. Nothing is added: most models expect
            `config.bos_token_id` first.
        params: for all prompts, or one for each.

    Returns:
        Pieces of the continuations as they come. Those of one row are in order, those of several
        rows are interleaved.

    Raises:
        ValueError: an empty prompt, ids outside [0, vocab_size), a prompt that with its
            max_new_tokens exceeds max_position_embeddings, stop strings without a tokenizer, or
            another number of params than of prompts.
    """
    every = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(every) != len(prompts):
        raise ValueError(f"params: got {len(every)}, expected one for each of {len(prompts)}")
    config = model.config
    sequences = []
    for row, (prompt, options) in enumerate(zip(prompts, every, strict=True)):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"prompts[{row}]: got {prompt!r:.80}, expected at least one token id")
        for name, given in ((f"prompts[{row}]", ids), ("stop_token_ids", options.stop_token_ids)):
            outside = [i for i in given if not 0 <= i < config.vocab_size]
            if outside:
                raise ValueError(
                    f"{name}: got token id {outside[0]}, expected ids in [0, {config.vocab_size})"
                )
        if len(ids) + options.max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"prompts[{row}]: got {len(ids)} tokens to be continued by max_new_tokens "
                f"{options.max_new_tokens}, expected at most max_position_embeddings "
                f"{config.max_position_embeddings} together"
            )
        if options.stop and model.tokenizer is None:
            raise ValueError(f"stop: got {options.stop}, but the model has no tokenizer")
        sequences.append(_Sequence(row, ids, options, config.eos_token_id, model.tokenizer))
    return _generate(model, sequences)


def encode_prompt(model: Model, text: str) -> list[int]:
    """BOS and the text's tokens; special-token strings in it are plain text.

    An empty text gives BOS alone, which the model continues with any text.

    Raises:
        ValueError: the model has no tokenizer, or the text cannot be encoded.
    """
    if model.tokenizer is None:
        raise ValueError("prompt: the model has no tokenizer, use token ids with `generate`")
    return [model.tokenizer.bos_id, *model.tokenizer.encode(text)]


def stream_text(model: Model, prompt: str, **options: Any) -> Iterator[str]:
    """Pieces of whole characters that continue a prompt.

    Args:
        model: with a tokenizer.
        prompt: see `encode_prompt`.
        options: fields of `SamplingParams`.

    Raises:
        ValueError: as `generate` and `encode_prompt`, before anything runs.
    """
    pieces = generate(model, [encode_prompt(model, prompt)], SamplingParams(**options))
    return (piece.text for piece in pieces if piece.text)


def generate_text(model: Model, prompt: str, **options: Any) -> str:
    """The continuation of a prompt; see `stream_text`."""
    return "".join(stream_text(model, prompt, **options))


def _max_slots() -> int:
    # A step for four takes a CPU as long as four steps for one, an accelerator as long as one.
    return 1 if jax.default_backend() == "cpu" else 4


def _new_cache(model: Model, capacity: int) -> Cache:
    slots = max(1, min(_max_slots(), SHARED_TOKENS // capacity))
    return model.new_cache(max_sequences=slots, max_tokens=slots * capacity)


def warm_up(model: Model, context: int) -> int:
    """Compiles all that `generate` runs for prompt and continuation of up to so many tokens.

    Returns:
        The number of programs.
    """
    num_programs = 0
    capacity = MIN_CAPACITY
    while True:
        for size in CHUNK_SIZES:
            cache = _new_cache(model, capacity)
            prompt = np.zeros(min(size, capacity // 2 + 1), np.int32)
            sequence = _Sequence(0, prompt, SamplingParams(max_new_tokens=2), -1, None)
            slot = cache.admit()
            emitted = _prefill(model, cache, {slot: sequence})
            num_programs += 1
        sequence.push(int(emitted[slot, 0]), timed=False)
        _decode(model, cache, {slot: sequence})
        num_programs += 1
        if capacity >= context:
            return num_programs
        capacity *= 2


def _generate(model: Model, sequences: list[_Sequence]) -> Iterator[Piece]:
    for capacity in sorted({sequence.capacity for sequence in sequences}):
        waiting = deque(s for s in sequences if s.capacity == capacity)
        cache = _new_cache(model, capacity)
        running: dict[int, _Sequence] = {}
        compiled = False
        while waiting or running:
            new: dict[int, _Sequence] = {}
            while waiting and len(running) + len(new) < cache.max_sequences:
                new[cache.admit()] = waiting.popleft()
            if new:
                emitted = _prefill(model, cache, new)
                running |= new
                yield from _push(cache, running, list(new), emitted, timed=False)
            else:
                emitted = _decode(model, cache, running)
                yield from _push(cache, running, list(running), emitted, timed=compiled)
                compiled = True


def _push(
    cache: Cache, running: dict[int, _Sequence], slots: list[int], emitted: np.ndarray, timed: bool
) -> Iterator[Piece]:
    """Gives sequences their new tokens; those that end leave their slots."""
    for slot in slots:
        for token_id in emitted[slot][emitted[slot] >= 0]:
            piece = running[slot].push(int(token_id), timed)
            if piece.finish:
                del running[slot]
                cache.release(slot)
            yield piece
            if piece.finish:
                break


def _chunk_size(rest: np.ndarray) -> int:
    return next((size for size in CHUNK_SIZES if size >= len(rest)), CHUNK_SIZES[-1])


def _prefill(model: Model, cache: Cache, new: dict[int, _Sequence]) -> np.ndarray:
    """Appends prompts to empty slots and samples their first tokens, [slots, 1]."""
    logits = jnp.zeros((cache.max_sequences, model.config.vocab_size), jnp.float32)
    rest = {slot: sequence.prompt for slot, sequence in new.items()}
    while rest:
        # `Model.prefill` cuts a batch as its longest row needs. Rows that need a chunk of one
        # size go together here, so that how a prompt is cut depends on its own length only.
        size = max(map(_chunk_size, rest.values()))
        tokens = np.zeros((cache.max_sequences, size), np.int32)
        lengths = np.zeros(cache.max_sequences, np.int32)
        for slot, ids in list(rest.items()):
            if _chunk_size(ids) == size:
                lengths[slot] = min(len(ids), size)
                tokens[slot, : lengths[slot]] = ids[:size]
                rest[slot] = ids[size:]
                if not len(rest[slot]):
                    del rest[slot]
        new_logits, _ = model.prefill(cache, tokens, lengths)
        logits = jnp.where(lengths[:, None] > 0, new_logits, logits)
    first = _sample(logits, _options(cache, new), np.zeros(cache.max_sequences, np.int32))
    return np.asarray(first)[:, None]


def _decode(model: Model, cache: Cache, running: dict[int, _Sequence]) -> np.ndarray:
    """Runs a chunk of steps; new tokens [slots, CHUNK_STEPS], -1 padded."""
    tokens = np.full(cache.max_sequences, -1, np.int32)
    steps, limits = np.zeros_like(tokens), np.zeros_like(tokens)
    num_stop_ids = max(len(sequence.stop_ids) for sequence in running.values())
    padded = -(-num_stop_ids // STOP_IDS_PADDING) * STOP_IDS_PADDING
    stop_ids = np.full((cache.max_sequences, padded), -1, np.int32)
    for slot, sequence in running.items():
        tokens[slot] = sequence.newest
        steps[slot] = sequence.num_new
        limits[slot] = sequence.params.max_new_tokens
        stop_ids[slot, : len(sequence.stop_ids)] = sequence.stop_ids
    cache.prepare_step(np.minimum(limits - steps, CHUNK_STEPS))
    emitted, arrays = _decode_chunk(
        model.graph,
        model.params,
        cache.arrays,
        tokens,
        _options(cache, running),
        steps,
        limits,
        stop_ids,
        num_steps=CHUNK_STEPS,
    )
    cache.replace_arrays(arrays)
    emitted = np.asarray(emitted)
    cache.advance((emitted >= 0).sum(axis=1))
    return emitted


def _options(cache: Cache, sequences: dict[int, _Sequence]) -> SamplingArrays:
    nobody = SamplingParams()
    return SamplingArrays.of(
        [
            sequences[slot].params if slot in sequences else nobody
            for slot in range(cache.max_sequences)
        ]
    )
