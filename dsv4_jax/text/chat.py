"""DeepSeek-V4's chat format: messages to a prompt, a completion to its parts."""

from collections.abc import Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, TypedDict

from dsv4_jax.text.constants import (
    ENCODING_FILE,
    REASONING_EFFORT_MAX,
    RESPONSE_FORMAT_TEMPLATE,
    TOOLS_TEMPLATE,
)
from dsv4_jax.text.dsml import (
    TOOL_CALLS_START,
    Scanner,
    Segment,
    parse_tool_calls,
    render_tool_calls,
    to_json,
)
from dsv4_jax.text.messages import Message, check_messages
from dsv4_jax.text.special_tokens import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    LATEST_REMINDER,
    TASKS,
    THINK_END,
    THINK_START,
    USER,
)
from dsv4_jax.text.tokenizer import Tokenizer

_BLANK_LINE: Segment = ("\n\n", False)


class Completion(TypedDict):
    """Parts of a completion; `tool_calls` are in OpenAI form, without ids."""

    content: str
    reasoning: str
    tool_calls: list[dict[str, Any]]


def encode_messages(
    messages: Sequence[Message],
    *,
    thinking_mode: str = "chat",
    drop_thinking: bool = True,
    reasoning_effort: str | None = None,
    constants: Mapping[str, str] | None = None,
) -> str:
    """The prompt of a conversation (DeepSeek-V4, encoding_dsv4.py).

    Tool results join the user turn around them, in the order of the calls; consecutive user
    messages become one turn, which keeps the task of the first of them only.

    Args:
        messages: of the form that `messages` describes; a prompt ends with the start of a reply
            where the last of them calls for one.
        thinking_mode: "chat" has the model answer at once, "thinking" has it reason first.
        drop_thinking: leave out the reasoning and, in thinking mode, the developer messages before
            the last user turn. A message with tools turns this off. Tool results are a user turn,
            so in a tool loop without `tools` the reasoning before the results is lost.
        reasoning_effort: None, "high" or "max"; only "max" in thinking mode changes the prompt.
        constants: fixed texts of `constants.load_constants`, needed for tools, a response format
            and the effort "max".

    Raises:
        ValueError: a bad option or message, named with its index, or a fixed text is missing.
    """
    segments = _prompt(messages, thinking_mode, drop_thinking, reasoning_effort, constants)
    return "".join(text for text, _ in segments)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    thinking_mode: str = "chat",
    drop_thinking: bool = True,
    reasoning_effort: str | None = None,
    constants: Mapping[str, str] | None = None,
    allow_special: bool = False,
) -> list[int]:
    """Token ids of `encode_messages`, in which only the format's own control tokens are special.

    Args:
        allow_special: strings of special tokens inside the messages become those tokens too.

    Raises:
        ValueError: as in `encode_messages` and `Tokenizer.encode`, or the tokenizer lacks a
            control token.
    """
    segments = _prompt(messages, thinking_mode, drop_thinking, reasoning_effort, constants)
    ids: list[int] = []
    # Only control tokens bound the BPE: between two of them all text is encoded as one.
    pending = ""
    for text, is_control in segments:
        if is_control and (text != DSML or DSML in tokenizer.special_tokens):
            ids += tokenizer.encode(pending, allow_special=allow_special)
            ids.append(tokenizer.token_id(text))
            pending = ""
        else:
            pending += text
    return ids + tokenizer.encode(pending, allow_special=allow_special)


def parse_completion(text: str, *, thinking_mode: str) -> Completion:
    """Parts of what the model wrote after a prompt, control tokens and EOS included.

    In thinking mode all before `</think>` is reasoning; content ends at EOS or at the blank line
    before tool calls, after which EOS may be missing. To go on, append
    `{"role": "assistant", "content": ..., "reasoning_content": ..., "tool_calls": ...}`.

    Raises:
        ValueError: a delimiter is missing, tool calls are malformed, text follows the end, or a
            control token stands inside reasoning or content.
    """
    _check_option("thinking_mode", thinking_mode, ("chat", "thinking"))
    scanner = Scanner(text)
    reasoning, tool_calls = "", []
    if thinking_mode == "thinking":
        reasoning, stop = scanner.until(THINK_END, TOOL_CALLS_START)
        if stop != THINK_END:
            raise ValueError(f"text: tool calls stand before {THINK_END}")
    content, stop = scanner.until(EOS, TOOL_CALLS_START)
    if stop == TOOL_CALLS_START:
        tool_calls = parse_tool_calls(scanner)
    rest = scanner.rest.removeprefix(EOS) if stop == TOOL_CALLS_START else scanner.rest
    if rest:
        raise ValueError(f"text: {len(rest)} characters follow the end of the turn: {rest[:40]!r}")
    for token in (BOS, EOS, THINK_START, THINK_END, DSML):
        if token in reasoning or token in content:
            raise ValueError(f"text: control token {token} inside reasoning or content")
    return Completion(content=content, reasoning=reasoning, tool_calls=tool_calls)


def _prompt(
    messages: Sequence[Message],
    thinking_mode: str,
    drop_thinking: bool,
    reasoning_effort: str | None,
    constants: Mapping[str, str] | None,
) -> list[Segment]:
    _check_option("thinking_mode", thinking_mode, ("chat", "thinking"))
    _check_option("reasoning_effort", reasoning_effort, (None, "high", "max"))
    check_messages(messages)
    thinking = thinking_mode == "thinking"
    drop_thinking = drop_thinking and not any(message.get("tools") for message in messages)
    turns = _merge_tool_results(messages)
    if thinking and drop_thinking:
        last_user = _last_user(turns)
        turns = [t for i, t in enumerate(turns) if t["role"] != "developer" or i >= last_user]
    last_user = _last_user(turns)

    segments: list[Segment] = [(BOS, True)]
    if turns and thinking and reasoning_effort == "max":
        segments.append((_fixed_text(constants, REASONING_EFFORT_MAX), False))
    for index, turn in enumerate(turns):
        previous = turns[index - 1] if index else {}
        reasons = thinking and previous.get("task") is None
        keeps_reasoning = reasons and (index > last_user or not drop_thinking)
        segments += _turn(turn, keeps_reasoning, constants)
        following = turns[index + 1]["role"] if index + 1 < len(turns) else "assistant"
        if following in ("assistant", "latest_reminder"):
            starts_thinking = thinking and (index >= last_user or not drop_thinking)
            segments += _transition(turn, thinking, starts_thinking)
    return segments


def _turn(
    turn: Message, keeps_reasoning: bool, constants: Mapping[str, str] | None
) -> Iterator[Segment]:
    """What a turn says, without what leads over to the reply."""
    role, content = turn["role"], turn.get("content") or ""
    match role:
        case "user":
            yield USER, True
            yield "\n\n".join(map(_user_part, turn["parts"])), False
        case "latest_reminder":
            yield LATEST_REMINDER, True
            yield content, False
        case "assistant":
            if keeps_reasoning:
                yield turn.get("reasoning_content") or "", False
                yield THINK_END, True
            yield content, False
            if turn.get("tool_calls"):
                yield from render_tool_calls(turn["tool_calls"])
            if not turn.get("wo_eos"):
                yield EOS, True
        case _:
            if role == "developer":
                yield USER, True
            yield content, False
            yield from _sections(turn, constants)


def _sections(message: Message, constants: Mapping[str, str] | None) -> Iterator[Segment]:
    """The tools and the response format of a system or developer message."""
    if tools := message.get("tools"):
        schemas = "\n".join(to_json(tool["function"]) for tool in tools)
        fields = {
            "tool_schemas": (schemas, False),
            "dsml_token": (DSML, True),
            "thinking_start_token": (THINK_START, True),
            "thinking_end_token": (THINK_END, True),
        }
        yield _BLANK_LINE
        yield from _fill(_fixed_text(constants, TOOLS_TEMPLATE), fields)
    if response_format := message.get("response_format"):
        yield _BLANK_LINE
        template = _fixed_text(constants, RESPONSE_FORMAT_TEMPLATE)
        yield from _fill(template, {"schema": (to_json(response_format), False)})


def _transition(turn: Message, thinking: bool, starts_thinking: bool) -> Iterator[Segment]:
    """What leads from a turn to the reply that follows it or that the model shall write."""
    task = turn.get("task")
    if task is None and turn["role"] in ("user", "developer"):
        yield ASSISTANT, True
        yield THINK_START if starts_thinking else THINK_END, True
    elif task == "action":
        yield ASSISTANT, True
        yield THINK_START if thinking else THINK_END, True
        yield TASKS[task], True
    elif task is not None:
        yield TASKS[task], True


def _merge_tool_results(messages: Sequence[Message]) -> list[Message]:
    """Messages as turns; a user turn has its user and tool messages as `parts`."""
    turns: list[Message] = []
    call_order: dict[str, int] = {}
    for message in messages:
        role = message["role"]
        if role not in ("user", "tool"):
            turns.append(message)
            continue
        turn = turns[-1] if turns else {}
        if turn.get("role") != "user" or (role == "user" and turn["task"] is not None):
            task = message.get("task") if role == "user" else None
            turn = {"role": "user", "task": task, "parts": []}
            turns.append(turn)
        turn["parts"].append(message)
    for turn in turns:
        if turn["role"] == "assistant" and turn.get("tool_calls"):
            ids = (call.get("id") or call["function"].get("id") for call in turn["tool_calls"])
            call_order = {call_id: i for i, call_id in enumerate(ids) if call_id}
        elif turn["role"] == "user":
            turn["parts"][:] = _in_call_order(turn["parts"], call_order)
    return turns


def _in_call_order(parts: list[Message], call_order: Mapping[str, int]) -> list[Message]:
    """Parts with the tool results among them in the order of their calls."""

    def position(result: Message) -> int:
        return call_order.get(result.get("tool_call_id", ""), 0)

    results = iter(sorted((p for p in parts if p["role"] == "tool"), key=position))
    return [next(results) if part["role"] == "tool" else part for part in parts]


def _user_part(part: Message) -> str:
    content = part.get("content") or ""
    if part["role"] == "user":
        return content
    if isinstance(content, list):
        content = "\n\n".join(
            item["text"] if item.get("type") == "text" else f"[Unsupported {item.get('type')}]"
            for item in content
        )
    return f"<tool_result>{content}</tool_result>"


def _last_user(turns: Sequence[Message]) -> int:
    users = (i for i, turn in enumerate(turns) if turn["role"] in ("user", "developer"))
    return max(users, default=-1)


def _fill(template: str, fields: Mapping[str, Segment]) -> Iterator[Segment]:
    """A template with `{field}` places, without turning its control tokens into text."""
    for literal, field, _, _ in Formatter().parse(template):
        yield literal, False
        if field is not None:
            yield fields[field]


def _fixed_text(constants: Mapping[str, str] | None, name: str) -> str:
    if constants is None or name not in constants:
        raise ValueError(
            f"constants: these messages need {name} of the model's {ENCODING_FILE}; "
            "pass what load_constants returns for a directory that has the file"
        )
    return constants[name]


def _check_option(name: str, value: object, expected: tuple[str | None, ...]) -> None:
    if value not in expected:
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")
