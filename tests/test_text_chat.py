"""Chat format: every rule of prompt construction, and the parsing of completions."""

import itertools
import json
import random

import pytest

from dsv4_jax.text.chat import encode_chat, encode_messages, parse_completion
from dsv4_jax.text.special_tokens import BOS, DSML, EOS, TASKS
from dsv4_jax.text.tokenizer import Tokenizer
from tests.test_text_tokenizer import SPECIAL, trained

USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
CONSTANTS = {
    "REASONING_EFFORT_MAX": "(think hard)\n",
    "TOOLS_TEMPLATE": "(write <{dsml_token}x> after {thinking_start_token}..{thinking_end_token}:"
    "\n{tool_schemas}\n)\n",
    "response_format_template": "(as {schema})",
}
TOOLS = [{"type": "function", "function": {"name": name, "description": "漢"}} for name in "FG"]
TOOLS_TEXT = (
    "(write <｜DSML｜x> after <think>..</think>:\n"
    '{"name": "F", "description": "漢"}\n{"name": "G", "description": "漢"}\n)\n'
)


def system(content="", **fields):
    return {"role": "system", "content": content, **fields}


def developer(content, **fields):
    return {"role": "developer", "content": content, **fields}


def user(content, **fields):
    return {"role": "user", "content": content, **fields}


def reminder(content):
    return {"role": "latest_reminder", "content": content}


def tool(content, tool_call_id):
    return {"role": "tool", "content": content, "tool_call_id": tool_call_id}


def assistant(content, reasoning=None, **fields):
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **fields}


def call(name="F", arguments="{}", call_id=None):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def encode(*messages, mode="chat", **options):
    options = {"constants": CONSTANTS, **options}
    return encode_messages(messages, thinking_mode=mode, **options)


def completion(*messages):
    """What the model would have written for an assistant turn."""
    return encode(*messages, mode="thinking").removeprefix(BOS)


# Worked strings.


def test_worked_chat_with_system():
    assert encode(system("S"), user("hi")) == f"{BOS}S{USER}hi{ASSISTANT}</think>"


TWO_TURNS = [user("a"), assistant("b", "r"), user("c")]


def test_worked_thinking_drops_earlier_reasoning():
    expected = f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}{USER}c{ASSISTANT}<think>"
    assert encode(*TWO_TURNS, mode="thinking") == expected


def test_worked_thinking_keeps_reasoning_when_told_so():
    expected = f"{BOS}{USER}a{ASSISTANT}<think>r</think>b{EOS}{USER}c{ASSISTANT}<think>"
    assert encode(*TWO_TURNS, mode="thinking", drop_thinking=False) == expected


# Roles.


def test_no_messages_give_bos():
    assert encode() == encode(mode="thinking", reasoning_effort="max") == BOS


def test_system_is_verbatim_and_has_no_transition():
    assert encode(system("S")) == f"{BOS}S"
    assert encode(system(), user("a")) == f"{BOS}{USER}a{ASSISTANT}</think>"
    assert encode({"role": "system"}, {"role": "user"}) == f"{BOS}{USER}{ASSISTANT}</think>"


def test_system_with_tools_and_response_format():
    prompt = encode(system("S", tools=TOOLS, response_format={"type": "漢"}))
    assert prompt == f'{BOS}S\n\n{TOOLS_TEXT}\n\n(as {{"type": "漢"}})'


def test_developer_is_a_user_turn_with_sections():
    prompt = encode(developer("D", tools=TOOLS, response_format={"a": 1}), mode="thinking")
    sections = f'\n\n{TOOLS_TEXT}\n\n(as {{"a": 1}})'
    assert prompt == f"{BOS}{USER}D{sections}{ASSISTANT}<think>"


def test_latest_reminder():
    prompt = encode(reminder("R"), user("a"))
    assert prompt == f"{BOS}{REMINDER}R{USER}a{ASSISTANT}</think>"


def test_user_before_a_reminder_already_calls_for_the_reply():
    prompt = encode(user("a"), reminder("R"), assistant("b"))
    assert prompt == f"{BOS}{USER}a{ASSISTANT}</think>{REMINDER}Rb{EOS}"


def test_user_before_system_calls_for_no_reply():
    prompt = encode(user("a"), system("S"), user("b"))
    assert prompt == f"{BOS}{USER}aS{USER}b{ASSISTANT}</think>"


def test_consecutive_user_messages_are_one_turn():
    assert encode(user("a"), user("b")) == f"{BOS}{USER}a\n\nb{ASSISTANT}</think>"


def test_assistant_in_chat_mode_shows_no_reasoning():
    prompt = encode(user("a"), assistant("b", "r"))
    assert prompt == f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}"


def test_assistant_after_the_last_user_keeps_its_reasoning():
    prompt = encode(user("a"), assistant("b", "r"), mode="thinking")
    assert prompt == f"{BOS}{USER}a{ASSISTANT}<think>r</think>b{EOS}"


def test_assistant_turn_can_stay_open():
    prompt = encode(user("a"), assistant("b", wo_eos=True))
    assert prompt == f"{BOS}{USER}a{ASSISTANT}</think>b"


# Tool results.


def test_tool_results_join_the_user_turn_in_call_order():
    calls = [call(call_id="x"), call(call_id="y"), call(call_id="z")]
    prompt = encode(
        user("a"),
        assistant("", tool_calls=calls),
        tool("3", "z"),
        tool("1", "x"),
        user("and"),
        tool("2", "y"),
    )
    turn = prompt.rpartition(USER)[2]
    results = [f"<tool_result>{i}</tool_result>" for i in (1, 2, 3)]
    assert turn == f"{results[0]}\n\n{results[1]}\n\nand\n\n{results[2]}{ASSISTANT}</think>"


def test_tool_result_of_unknown_call_counts_as_the_first():
    calls = [call(call_id="x"), call(call_id="y")]
    prompt = encode(assistant("", tool_calls=calls), tool("2", "y"), tool("?", "q"))
    expected = "<tool_result>?</tool_result>\n\n<tool_result>2</tool_result>"
    assert prompt.rpartition(USER)[2] == f"{expected}{ASSISTANT}</think>"


def test_tool_result_in_parts():
    parts = [{"type": "text", "text": "1"}, {"type": "image"}, {"type": "text", "text": "2"}]
    prompt = encode(tool(parts, "x"))
    text = "1\n\n[Unsupported image]\n\n2"
    assert prompt == f"{BOS}{USER}<tool_result>{text}</tool_result>{ASSISTANT}</think>"


# Tool calls.


def test_tool_calls_markup():
    arguments = '{"city": "Köln\\n2", "days": 3, "deep": {"a": [true, null]}}'
    prompt = encode(user("a"), assistant("b", tool_calls=[call("F", arguments), call("G")]))
    markup = (
        "<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="F">\n'
        '<｜DSML｜parameter name="city" string="true">Köln\n2</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="deep" string="false">{"a": [true, null]}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="G">\n'
        "\n"
        "</｜DSML｜invoke>\n"
        "</｜DSML｜tool_calls>"
    )
    assert prompt.rpartition("</think>")[2] == f"b\n\n{markup}{EOS}"


def test_arguments_that_are_not_json_become_one_parameter():
    prompt = encode(assistant("", tool_calls=[call(arguments="{oops")]))
    assert '<｜DSML｜parameter name="arguments" string="true">{oops</｜DSML｜parameter>' in prompt


def test_arguments_that_are_no_object():
    with pytest.raises(ValueError, match=r"expected a JSON object, got '\[1\]'"):
        encode(assistant("", tool_calls=[call(arguments="[1]")]))


# Dropping.

TOOL_LOOP = [user("a"), assistant("", "r", tool_calls=[call(call_id="x")]), tool("1", "x")]


def test_tools_turn_dropping_off():
    for first in (system("S", tools=TOOLS), developer("D", tools=TOOLS)):
        prompt = encode(first, *TWO_TURNS, mode="thinking")
        assert f"{USER}a{ASSISTANT}<think>r</think>b{EOS}" in prompt
    assert "r</think>" in encode(system(tools=TOOLS), *TOOL_LOOP, mode="thinking")
    empty = encode(system(tools=[]), *TWO_TURNS, mode="thinking")
    assert empty == encode(*TWO_TURNS, mode="thinking")


def test_tool_loop_without_tools_loses_its_reasoning():
    prompt = encode(*TOOL_LOOP, mode="thinking")
    assert prompt.startswith(f"{BOS}{USER}a{ASSISTANT}</think>\n\n<{DSML}tool_calls>")
    assert prompt.endswith(f"<tool_result>1</tool_result>{ASSISTANT}<think>")


def test_earlier_developer_turns_are_dropped():
    messages = [developer("D"), assistant("b", "r"), user("c")]
    after = f"{USER}c{ASSISTANT}"
    assert encode(*messages, mode="thinking") == f"{BOS}b{EOS}{after}<think>"
    kept = f"{BOS}{USER}D{ASSISTANT}"
    assert encode(*messages) == f"{kept}</think>b{EOS}{after}</think>"
    assert (
        encode(*messages, mode="thinking", drop_thinking=False)
        == f"{kept}<think>r</think>b{EOS}{after}<think>"
    )


def test_last_developer_turn_stays():
    prompt = encode(user("a"), assistant("b", "r"), developer("D"), mode="thinking")
    assert prompt == f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}{USER}D{ASSISTANT}<think>"


# Reasoning effort.


def test_max_effort_stands_before_the_first_message():
    prompt = encode(system("S"), user("a"), mode="thinking", reasoning_effort="max")
    assert prompt == f"{BOS}(think hard)\nS{USER}a{ASSISTANT}<think>"


def test_other_efforts_and_chat_mode_insert_nothing():
    plain = encode(user("a"), mode="thinking")
    for effort in ("high", None):
        assert encode(user("a"), mode="thinking", reasoning_effort=effort) == plain
    assert encode(user("a"), reasoning_effort="max") == encode(user("a"))


# Tasks.


@pytest.mark.parametrize(("mode", "think"), [("chat", "</think>"), ("thinking", "<think>")])
def test_action_task(mode, think):
    prompt = encode(user("a", task="action"), mode=mode)
    assert prompt == f"{BOS}{USER}a{ASSISTANT}{think}<｜action｜>"


@pytest.mark.parametrize("task", [task for task in TASKS if task != "action"])
def test_other_tasks_follow_the_message(task):
    assert encode(user("a", task=task), mode="thinking") == f"{BOS}{USER}a<｜{task}｜>"


def test_reply_to_a_task_has_no_reasoning():
    prompt = encode(user("a", task="query"), assistant("b", "r"), mode="thinking")
    assert prompt == f"{BOS}{USER}a<｜query｜>b{EOS}"


def test_title_task_follows_an_assistant_turn():
    prompt = encode(user("a"), assistant("b", task="title"), assistant("T", "r"), mode="thinking")
    assert prompt == f"{BOS}{USER}a{ASSISTANT}<think></think>b{EOS}<｜title｜>T{EOS}"


def test_task_before_another_user_turn_is_not_asked():
    prompt = encode(user("a", task="query"), user("b"))
    assert prompt == f"{BOS}{USER}a{USER}b{ASSISTANT}</think>"


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "deep"}, r"thinking_mode: expected one of .*, got 'deep'"),
        ({"reasoning_effort": "low"}, r"reasoning_effort: expected one of .*, got 'low'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        encode(user("a"), **options)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"content": "a"}, r"messages\[1\]\.role: expected one of system.*, got None"),
        ({"role": "robot"}, r"\.role: expected one of .*, got 'robot'"),
        (user(5), r"messages\[1\]\.content: expected str, got 5"),
        (user([{"type": "text", "text": "a"}]), r"\.content: expected str, got \["),
        (developer(""), r"\.content: a developer message must not be empty"),
        ({"role": "developer"}, r"\.content: expected str, got None"),
        ({"role": "latest_reminder"}, r"\.content: expected str, got None"),
        (tool([5], "x"), r"\.content\[0\]: expected Mapping, got 5"),
        (tool([{"type": "text"}], "x"), r"\.content\[0\]\.text: expected str, got None"),
        (user("a", task="sing"), r"\.task: expected one of action.*, got 'sing'"),
        (user("a", tools=TOOLS), r"\.tools: only a system or developer message can have it"),
        (assistant("a", response_format={"a": 1}), r"\.response_format: only a system"),
        (system(tools={"a": 1}), r"\.tools: expected list, got \{'a': 1\}"),
        (system(tools=[{"name": "F"}]), r"\.tools\[0\]\.function: expected Mapping, got None"),
        (assistant("a", 5), r"\.reasoning_content: expected str, got 5"),
        (assistant("a", tool_calls=["F"]), r"\.tool_calls\[0\]: expected Mapping, got 'F'"),
        (assistant("a", tool_calls=[{}]), r"\.tool_calls\[0\]\.function: expected Mapping"),
        (assistant("a", tool_calls=[call(5)]), r"\.function\.name: expected str, got 5"),
        (assistant("a", tool_calls=[call("F", {})]), r"\.arguments: expected str, got \{\}"),
        (system(response_format={"a": {1}}), r"no JSON form of \{'a': \{1\}\}"),
    ],
)
def test_bad_messages(message, error):
    with pytest.raises(ValueError, match=error):
        encode(user("a"), message)


@pytest.mark.parametrize(
    ("message", "effort", "name"),
    [
        (system(tools=TOOLS), None, "TOOLS_TEMPLATE"),
        (system(response_format={"a": 1}), None, "response_format_template"),
        (user("a"), "max", "REASONING_EFFORT_MAX"),
    ],
)
def test_missing_fixed_text(message, effort, name):
    for constants in (None, {}):
        with pytest.raises(ValueError, match=rf"need {name} of .*encoding/encoding_dsv4\.py"):
            encode(message, mode="thinking", reasoning_effort=effort, constants=constants)


def test_plain_conversations_need_no_fixed_text():
    assert encode(*TWO_TURNS, mode="thinking", reasoning_effort="high", constants=None)


# Token ids.


@pytest.fixture(scope="module", params=[True, False], ids=["splits", "no_splits"])
def tokenizer(request):
    return Tokenizer(trained(splits=request.param).to_str())


CONVERSATION = [
    system("Be brief. ", tools=TOOLS, response_format={"type": "o"}),
    user("hello 漢字🙂"),
    assistant("\n", "let me see", tool_calls=[call(arguments='{"a": "é\\n", "b": 2}')]),
    tool("hello", "x"),
    assistant("b", "r", task="title"),
    assistant("T"),
    reminder("now"),
    user("c", task="action"),
]


def test_chat_ids_are_those_of_the_whole_prompt(tokenizer):
    for mode, effort in itertools.product(["chat", "thinking"], [None, "max"]):
        options = {"thinking_mode": mode, "reasoning_effort": effort, "constants": CONSTANTS}
        prompt = encode_messages(CONVERSATION, **options)
        ids = tokenizer.encode(prompt, allow_special=True)
        assert encode_chat(tokenizer, CONVERSATION, **options) == ids
        assert encode_chat(tokenizer, CONVERSATION, allow_special=True, **options) == ids


def everywhere(text: str):
    """A conversation with `text` in every place that a caller can fill."""
    function = {"name": text, "arguments": json.dumps({text: text, "n": [text]})}
    return [
        system(text, tools=[{"function": {"name": text}}], response_format={text: text}),
        developer(text),
        user(text),
        reminder(text),
        assistant(text, text, tool_calls=[{"id": "x", "function": function}]),
        tool(text, "x"),
        tool([{"type": "text", "text": text}, {"type": text}], "x"),
        user(text),
    ]


@pytest.mark.parametrize("injected", [*SPECIAL, "".join(SPECIAL)])
def test_special_strings_inside_messages_stay_text(tokenizer, injected):
    options = {"thinking_mode": "thinking", "constants": CONSTANTS}
    special_ids = set(tokenizer.special_tokens.values())

    def controls(messages, **more):
        ids = encode_chat(tokenizer, messages, **options, **more)
        assert tokenizer.decode(ids) == encode_messages(messages, **options)
        return [i for i in ids if i in special_ids]

    harmless = controls(everywhere("x"))
    assert controls(everywhere(injected)) == harmless
    assert len(controls(everywhere(injected), allow_special=True)) > len(harmless)


def test_tokenizer_without_control_tokens():
    bare = Tokenizer(trained(special=(BOS, EOS)).to_str())
    with pytest.raises(ValueError, match="'<｜User｜>' is not in the vocabulary"):
        encode_chat(bare, [user("a")])


def test_markup_is_text_where_it_is_no_token():
    special = tuple(token for token in SPECIAL if token != DSML)
    tokenizer = Tokenizer(trained(special=special).to_str())
    messages = [assistant("", tool_calls=[call()])]
    ids = encode_chat(tokenizer, messages)
    assert ids == tokenizer.encode(encode_messages(messages), allow_special=True)


# Completions.


def test_parse_chat_and_thinking():
    parts = parse_completion(f"b\n{EOS}", thinking_mode="chat")
    assert parts == {"content": "b\n", "reasoning": "", "tool_calls": []}
    parts = parse_completion(f"r\n</think>b{EOS}", thinking_mode="thinking")
    assert parts == {"content": "b", "reasoning": "r\n", "tool_calls": []}


MARKUP = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="F">\n'
    '<｜DSML｜parameter name="a" string="true">1.50 <b> "</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">1.50</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="G">\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>"
)


@pytest.mark.parametrize("end", [EOS, ""])
def test_parse_tool_calls(end):
    parts = parse_completion(f"r</think>b{MARKUP}{end}", thinking_mode="thinking")
    assert (parts["reasoning"], parts["content"]) == ("r", "b")
    assert parts["tool_calls"] == [
        {
            "type": "function",
            "function": {"name": "F", "arguments": '{"a": "1.50 <b> \\"", "n": 1.50}'},
        },
        {"type": "function", "function": {"name": "G", "arguments": "{}"}},
    ]


def test_parse_reverses_encode():
    rng = random.Random(0)
    texts = ["", "a", "漢字🙂", "x\n\ny", '"', "<b>", "{}", "null", "\n", "</tool_result>"]
    values = [*texts, 0, -1.5, True, None, [], [1, "漢"], {"k": {"q": '"'}}]
    for _ in range(300):
        calls = []
        for _ in range(rng.randint(0, 3)):
            arguments = {key: rng.choice(values) for key in rng.sample("abc漢", rng.randint(0, 4))}
            calls.append(call(rng.choice("FG"), json.dumps(arguments)))
        turn = assistant(rng.choice(texts), rng.choice(texts), tool_calls=calls)
        parts = parse_completion(completion(turn), thinking_mode="thinking")
        assert parts["content"] == turn["content"]
        assert parts["reasoning"] == turn["reasoning_content"]
        named = [
            (c["function"]["name"], json.loads(c["function"]["arguments"]))
            for c in parts["tool_calls"]
        ]
        assert named == [
            (c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls
        ]
        again = assistant(parts["content"], parts["reasoning"], tool_calls=parts["tool_calls"])
        assert completion(again) == completion(turn)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("b", "expected '</think>'"),
        (f"b{EOS}", "expected '</think>'"),
        (f"r{MARKUP}", "tool calls stand before </think>"),
        ("r</think>b", f"expected '{EOS}'"),
        (f"r</think>b{EOS}c", "1 characters follow the end of the turn: 'c'"),
        (f"r</think>b{EOS}{EOS}", "follow the end of the turn"),
        (f"r</think>b{MARKUP}c", "follow the end of the turn"),
        (f"r</think>b</think>c{EOS}", "control token </think> inside"),
        (f"<think>r</think>c{EOS}", "control token <think> inside"),
        (f"r{BOS}</think>c{EOS}", "control token .* inside"),
        (f"r</think>{DSML}{EOS}", "control token ｜DSML｜ inside"),
    ],
)
def test_malformed_completions(text, error):
    with pytest.raises(ValueError, match=error):
        parse_completion(text, thinking_mode="thinking")


@pytest.mark.parametrize(
    ("good", "bad", "error"),
    [
        ("</｜DSML｜tool_calls>", "", "expected .*tool_calls"),
        ("</｜DSML｜invoke>\n</｜DSML｜tool_calls>", "", "expected .*/｜DSML｜invoke"),
        ("tool_calls>\n<｜DSML｜invoke", "tool_calls><｜DSML｜invoke", "expected '>' and a line"),
        ("</｜DSML｜invoke>\n<", "</｜DSML｜invoke> so <", "expected '>' and a line break"),
        ('invoke name="F"', "invoke F", "malformed name of a tool call"),
        ('string="true"', 'string="maybe"', "malformed parameter"),
        ('name="a" ', "", "malformed parameter"),
        ("1.50</", "1.50/", "malformed parameter"),
        ("</｜DSML｜parameter>\n</", "</｜DSML｜parameter></", "expected '>' and a line break"),
        ('name="n"', 'name="a"', "parameter 'a' comes twice"),
        (">1.50<", ">Köln<", "parameter 'n' of a tool call is not JSON: 'Köln'"),
        (">1.50<", f">{'[' * 100_000}<", "parameter 'n' of a tool call is not JSON"),
        ("\n</｜DSML｜tool_calls>", "", "expected"),
    ],
)
def test_malformed_tool_calls(good, bad, error):
    text = MARKUP.replace(good, bad, 1)
    assert text != MARKUP
    with pytest.raises(ValueError, match=error):
        parse_completion(f"b{text}{EOS}", thinking_mode="chat")


def test_cut_tool_calls_are_no_empty_list():
    for end in range(MARKUP.index("tool_calls") + len("tool_calls"), len(MARKUP)):
        with pytest.raises(ValueError, match="text: "):
            parse_completion(f"b{MARKUP[:end]}", thinking_mode="chat")


def test_parse_option():
    with pytest.raises(ValueError, match="thinking_mode: expected one of"):
        parse_completion(EOS, thinking_mode="max")
