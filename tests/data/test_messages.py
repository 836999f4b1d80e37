import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from veneer.data.example import Example, Message
from veneer.data.messages import FORMATS, detect_format, to_example
from veneer.data.rows import Row, RowError
from veneer.errors import DataError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TURNS = (Message("user", "Hi"), Message("assistant", "Hello"))


def read(values: dict, format: str | None = None) -> Example:
    return to_example(Row(values, "f.jsonl:7"), format or detect_format(values))


def chat(*turns) -> dict:
    return {"messages": list(turns)}


@pytest.mark.parametrize(
    ("values", "format"),
    [
        ({"messages": [USER, ANSWER]}, "messages"),
        ({"conversation": [USER, ANSWER]}, "messages"),
        ({"conversations": [USER, ANSWER], "prompt": "Hi", "completion": "x"}, "messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "sharegpt"),
        ({"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "sharegpt"),
        ({"instruction": "Hi", "output": "Hello", "text": "both"}, "alpaca"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca"),
        ({"instruction": "Hi", "context": None, "response": "Hello"}, "alpaca"),
        ({"prompt": [USER], "completion": [ANSWER]}, "completion"),
    ],
)
def test_every_conversation_format_gives_the_same_turns(values, format):
    assert detect_format(values) == format
    assert read(values) == Example("f.jsonl:7", messages=TURNS)


@pytest.mark.parametrize(
    "keys", [("prompt", "completion"), ("prompt", "response"), ("question", "answer")], ids="-".join
)
def test_pairs_of_text_stay_raw(keys):
    values = {keys[0]: "2+2=", keys[1]: " 4"}
    assert detect_format(values) == "completion"
    assert read(values) == Example("f.jsonl:7", prompt="2+2=", completion=" 4")


def test_text_is_a_completion_without_a_prompt():
    assert read({"text": " once\n"}) == Example("f.jsonl:7", completion=" once\n")


@pytest.mark.parametrize(
    "values",
    [{}, {"label": 3}, {"chosen": "a", "rejected": "b"}, {"prompt": "a"}, {"messages": [{"speaker": "a"}]}],
)
def test_other_rows_have_no_format(values):
    assert detect_format(values) is None


@pytest.mark.parametrize(
    ("role", "expected"),
    [("human", "user"), ("GPT", "assistant"), ("model", "assistant"), ("developer", "system"), ("observation", "tool")],
)
def test_roles_are_mapped(role, expected):
    turns = [{"from": role, "value": "x"}, {"from": "gpt", "value": "y"}]
    assert read({"conversations": turns}).messages[0].role == expected


def test_alpaca_joins_input_system_and_history():
    values = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be terse", "history": [["a", "b"]]}
    roles = [("system", "Be terse"), ("user", "a"), ("assistant", "b"), ("user", "Add\n\n1 2"), ("assistant", "3")]
    assert read(values).messages == tuple(Message(*turn) for turn in roles)


def test_the_system_key_of_a_row_yields_to_a_system_turn():
    assert read({"system": "S", **chat(USER, ANSWER)}).messages[0] == Message("system", "S")
    own = {"role": "system", "content": "own"}
    assert read({"system": "S", **chat(own, USER, ANSWER)}).messages[0] == Message("system", "own")


def test_text_parts_are_joined_and_null_extras_ignored():
    parts = [{"type": "text", "text": "a", "image_url": None}, {"type": "text", "text": "b"}]
    turn = {"role": "user", "content": parts, "tool_calls": None, "name": None}
    assert read(chat(turn, ANSWER)).messages[0].content == "ab"


BAD = {
    "unknown role": (chat({"role": "critic", "content": "x"}), "messages[0].role: unknown role 'critic'; use"),
    "role is a number": (chat({"role": 1, "content": "x"}), "'messages[0].role' is a number, not text"),
    "no role": (chat(USER, {"content": "x"}), "'messages[1].role' is missing or null"),
    "content is a number": (chat({"role": "user", "content": 4}), "'messages[0].content' is a number, not text"),
    "content is null": (chat({"role": "user", "content": None}), "'messages[0].content' is missing or null"),
    "tool calls": (
        chat(USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}),
        "messages[1]: tool calls are not supported yet",
    ),
    "sharegpt tool call": (
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        "tool calls are not supported yet",
    ),
    "weight": (chat(USER, {**ANSWER, "weight": 0}), "weights of single messages are not supported"),
    "image": (chat({"role": "user", "content": [{"type": "image_url"}]}), "content[0]: only parts of type 'text'"),
    "part is text": (chat({"role": "user", "content": ["a"]}), "messages[0].content[0] is text, not an object"),
    "turn is text": (chat("Hi"), "messages[0] is text, not an object with 'role' and 'content'"),
    "turns are text": ({"messages": "Hi"}, "'messages' is text, not a list of messages"),
    "no turn": (chat(), "nothing to learn from: the conversation has no assistant turn"),
    "no assistant turn": (chat(USER), "nothing to learn from: the conversation has no assistant turn"),
    "empty assistant": (chat(USER, {"role": "assistant", "content": " "}), "nothing to learn from: an assistant turn"),
    "alpaca output": ({"instruction": "a", "output": 3}, "'output' is a number, not text"),
    "alpaca empty": ({"instruction": "a", "output": ""}, "nothing to learn from"),
    "alpaca history": ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' is not a list of"),
    "alpaca system": ({"instruction": "a", "output": "b", "system": 1}, "'system' is a number"),
    "completion empty": ({"prompt": "a", "completion": ""}, "nothing to learn from: 'completion' is empty"),
    "completion null": ({"question": "a", "answer": None}, "'answer' is missing or null"),
    "mixed TRL": ({"prompt": [USER], "completion": "a"}, "'completion' is text, not a list of messages"),
    "text empty": ({"text": "\n"}, "nothing to learn from: 'text' is empty"),
    "text is a boolean": ({"text": True}, "'text' is a boolean, not text"),
    "surrogate": ({"text": "a\ud800"}, "half of a surrogate pair"),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD.keys())
def test_bad_rows_say_where_and_what(values, message):
    with pytest.raises(RowError) as caught:
        read(values)
    assert str(caught.value).startswith("f.jsonl:7: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_format_name_is_refused():
    with pytest.raises(DataError, match="unknown data format 'chatml'; choose one of messages"):
        read({"text": "a"}, "chatml")


def test_a_format_that_does_not_fit_names_the_key():
    with pytest.raises(RowError, match="'text' is missing or null"):
        read(chat(USER, ANSWER), "text")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "gpt"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls"]), inner)
    ),
    max_leaves=12,
)
known_keys = st.sampled_from(
    ["messages", "conversations", "instruction", "input", "output", "prompt", "completion", "text", "system", "history"]
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.dictionaries(known_keys, json_values, max_size=4), format=st.sampled_from(FORMATS))
def test_any_row_gives_an_example_or_a_row_error(values, format):
    assert detect_format(values) in (*FORMATS, None)
    try:
        example = read(values, format)
    except RowError as error:
        assert error.where == "f.jsonl:7"
    else:
        assert example.completion.strip() or any(turn.role == "assistant" for turn in example.messages)
