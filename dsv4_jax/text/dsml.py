"""DSML, the markup of tool calls.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="F">
    <｜DSML｜parameter name="A" string="true|false">value</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

The value of a parameter with string="true" is raw text, of any other JSON.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsv4_jax.text.special_tokens import DSML

# A piece of a prompt, and whether it is a control token.
Segment = tuple[str, bool]

TOOL_CALLS_START = f"\n\n<{DSML}tool_calls"
_TOOL_CALLS_END = f"</{DSML}tool_calls>"
_INVOKE_START, _INVOKE_END = f"<{DSML}invoke", f"</{DSML}invoke"
# The end is without its "<": a closing tag that is damaged there must not make the value run on.
_PARAMETER_START, _PARAMETER_END = f"<{DSML}parameter", f"/{DSML}parameter"

_INVOKE_HEAD = re.compile(r'\s*name="(.*)">\n\n?', re.DOTALL)
_PARAMETER = re.compile(r' name="(.*?)" string="(true|false)">(.*)<', re.DOTALL)


class Scanner:
    """Reads a text from stop string to stop string."""

    def __init__(self, text: str):
        self._text = text
        self._position = 0

    @property
    def rest(self) -> str:
        return self._text[self._position :]

    def until(self, *stops: str) -> tuple[str, str]:
        """What stands before the first of `stops`, and that stop; moves behind it.

        Raises:
            ValueError: none of the stops is left in the text.
        """
        # One alternation, since a `find` for each stop would scan to the end for an absent one.
        found = re.compile("|".join(map(re.escape, stops))).search(self._text, self._position)
        if found is None:
            expected = " or ".join(map(repr, stops))
            raise ValueError(f"text: expected {expected} in {_excerpt(self.rest)}")
        before = self._text[self._position : found.start()]
        self._position = found.end()
        return before, found.group()


def to_json(value: Any) -> str:
    """JSON as prompts hold it: one line, non-ASCII characters as themselves.

    Raises:
        ValueError: the value has no JSON form.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"no JSON form of {_excerpt(value)}: {error}") from error


def render_tool_calls(tool_calls: Sequence[Mapping[str, Any]]) -> Iterator[Segment]:
    """The markup of calls, from the blank line to the closing tag.

    Args:
        tool_calls: OpenAI form, `{"function": {"name": str, "arguments": str}}` with a JSON object
            as text. Arguments that are not JSON become one parameter named "arguments".

    Raises:
        ValueError: the arguments are JSON but not an object.
    """
    yield "\n\n", False
    yield from _tag("<", "tool_calls>\n")
    for tool_call in tool_calls:
        function = tool_call["function"]
        yield from _tag("<", f'invoke name="{function["name"]}">\n')
        for i, (key, value) in enumerate(_arguments(function["arguments"]).items()):
            is_string = isinstance(value, str)
            string = "true" if is_string else "false"
            yield from _tag("\n<" if i else "<", f'parameter name="{key}" string="{string}">')
            yield value if is_string else to_json(value), False
            yield from _tag("</", "parameter>")
        yield from _tag("\n</", "invoke>\n")
    yield from _tag("</", "tool_calls>")


def parse_tool_calls(scanner: Scanner) -> list[dict[str, Any]]:
    """Calls in OpenAI form, without ids, from a scanner that stands behind `TOOL_CALLS_START`.

    Raises:
        ValueError: the markup is malformed, a parameter comes twice, or a value that should be
            JSON is not.
    """
    tool_calls = []
    while _next_tag(scanner, _INVOKE_START, _TOOL_CALLS_END) == _INVOKE_START:
        head, tag = scanner.until(_PARAMETER_START, _INVOKE_END)
        invoke = _INVOKE_HEAD.fullmatch(head)
        if invoke is None:
            raise ValueError(f"text: malformed name of a tool call: {_excerpt(head)}")
        arguments: dict[str, str] = {}
        while tag == _PARAMETER_START:
            name, value = _parse_parameter(scanner.until(_PARAMETER_END)[0])
            if name in arguments:
                raise ValueError(f"text: parameter {name!r} comes twice in a tool call")
            arguments[name] = value
            tag = _next_tag(scanner, _PARAMETER_START, _INVOKE_END)
        # The values are joined as text, so that numbers keep the digits that were written.
        fields = ", ".join(f"{to_json(name)}: {value}" for name, value in arguments.items())
        function = {"name": invoke[1], "arguments": f"{{{fields}}}"}
        tool_calls.append({"type": "function", "function": function})
    return tool_calls


def _tag(opening: str, rest: str) -> Iterator[Segment]:
    yield opening, False
    yield DSML, True
    yield rest, False


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return {"arguments": text}
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of a tool call: expected a JSON object, got {_excerpt(text)}")
    return arguments


def _next_tag(scanner: Scanner, *tags: str) -> str:
    """The next of `tags`, of which only the end of a line may keep the scanner."""
    between, tag = scanner.until(*tags)
    if between != ">\n":
        raise ValueError(f"text: expected '>' and a line break in a tool call, got {between!r}")
    return tag


def _parse_parameter(text: str) -> tuple[str, str]:
    """Name and JSON value of a parameter."""
    parameter = _PARAMETER.fullmatch(text)
    if parameter is None:
        raise ValueError(f"text: malformed parameter of a tool call: {_excerpt(text)}")
    name, string, value = parameter.groups()
    if string == "true":
        return name, to_json(value)
    try:
        json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"text: parameter {name!r} of a tool call is not JSON: {_excerpt(value)}"
        ) from error
    return name, value


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
