"""What a conversation is made of.

Messages are dicts in OpenAI form. Each has a `role` and, by role:

    system, developer   content; tools: [{"function": {...}}]; response_format: a JSON schema
    user                content
    tool                content, or a list of {"type": "text", "text": ...}; tool_call_id
    latest_reminder     content
    assistant           content; reasoning_content; wo_eos: true leaves the turn open;
                        tool_calls: [{"id": ..., "function": {"name": ..., "arguments": JSON text}}]

Any of them may have a `task`, a key of `special_tokens.TASKS`, to which the next turn replies.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv4_jax.text.special_tokens import TASKS

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "tool", "latest_reminder", "assistant")


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse what cannot be encoded, or would be encoded without a part of it.

    Raises:
        ValueError: names the message's index and field, what came and what was expected.
    """
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)


def _check_message(where: str, message: Message) -> None:
    _check_type(where, message, Mapping)
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role: expected one of {', '.join(ROLES)}, got {role!r}")
    _check_content(f"{where}.content", role, message.get("content"))
    for field in ("tools", "response_format"):
        if message.get(field) and role not in ("system", "developer"):
            raise ValueError(f"{where}.{field}: only a system or developer message can have it")
    for i, tool in enumerate(_list(where, message, "tools")):
        _check_type(f"{where}.tools[{i}]", tool, Mapping)
        _check_type(f"{where}.tools[{i}].function", tool.get("function"), Mapping)
    for i, call in enumerate(_list(where, message, "tool_calls")):
        _check_type(f"{where}.tool_calls[{i}]", call, Mapping)
        function = call.get("function")
        _check_type(f"{where}.tool_calls[{i}].function", function, Mapping)
        for field in ("name", "arguments"):
            _check_type(f"{where}.tool_calls[{i}].function.{field}", function.get(field), str)
    _check_type(f"{where}.reasoning_content", message.get("reasoning_content") or "", str)
    task = message.get("task")
    if task is not None and task not in TASKS:
        raise ValueError(f"{where}.task: expected one of {', '.join(TASKS)}, got {task!r}")


def _check_content(where: str, role: str, content: object) -> None:
    if role == "tool" and isinstance(content, list):
        for i, part in enumerate(content):
            _check_type(f"{where}[{i}]", part, Mapping)
            if part.get("type") == "text":
                _check_type(f"{where}[{i}].text", part.get("text"), str)
    elif role in ("developer", "latest_reminder"):
        _check_type(where, content, str)
        if role == "developer" and not content:
            raise ValueError(f"{where}: a developer message must not be empty")
    else:
        _check_type(where, "" if content is None else content, str)


def _list(where: str, message: Message, field: str) -> list[Any]:
    value = message.get(field) or []
    _check_type(f"{where}.{field}", value, list)
    return value


def _check_type(where: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise ValueError(f"{where}: expected {expected.__name__}, got {value!r:.60}")
