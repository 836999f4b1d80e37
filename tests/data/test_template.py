"""What is supervised is exactly what the assistant says and its end-of-turn token, whatever the template."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import CHATML
from veneer.data.example import Example, Message
from veneer.data.mask import tokenize_batch
from veneer.data.template import render
from veneer.errors import TemplateError

GENERATION = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}",
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system role here') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in c and not loop.last %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ c }}<|im_end|>\n{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
STYLES = {
    "chatml": {"template": CHATML},
    "generation": {"template": GENERATION},
    "llama3": {
        "template": LLAMA3,
        "special": ("<|begin|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "eos": "<|eot_id|>",
        "bos": "<|begin|>",
    },
    "llama2": {"template": LLAMA2, "special": ("<s>", "</s>"), "eos": "</s>", "bos": "<s>"},
    "gemma": {
        "template": GEMMA,
        "special": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "eos": "<eos>",
        "bos": "<bos>",
    },
    "qwen3": {"template": QWEN3},
}
END = {"chatml": "<|im_end|>", "generation": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>"}
END |= {"llama2": " </s>", "gemma": "<end_of_turn>"}


def chat(*contents, system=None):
    roles = ("user", "assistant")
    turns = [Message(roles[i % 2], c) for i, c in enumerate(contents)]
    return Example("chat.jsonl:7", tuple([Message("system", system)] if system else []) + tuple(turns))


def supervised(example, tokenizer, **options):
    (tokens,) = tokenize_batch([render(example, tokenizer, **options)], tokenizer)
    return tokenizer.decode(tokens.input_ids[tokens.supervised].tolist(), skip_special_tokens=False)


@pytest.fixture(scope="module")
def tokenizers(make_tokenizer):
    return {name: make_tokenizer(**style) for name, style in STYLES.items()}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "contents",
    [
        ("hello", "Hi there!"),
        ("a", "b", "c", "d", "e", "f"),
        ("same", "same", "same", "same"),
        ("say 😀", "ünï 😀 日本 <b>&amp;"),
        ("x", "line one\n\nline two\n- three"),
        ("veneersentinel0z", "veneersentinel1z and veneersentinel0z", "y", "veneersentinel"),
        ("{{ m }}", "{% if %} {{ content }}"),
    ],
)
def test_supervised_is_the_answer_and_its_end(style, contents, tokenizers):
    expected = "".join(answer + END[style] for answer in contents[1::2])
    found = supervised(chat(*contents), tokenizers[style])
    assert found.replace(" ", "") == expected.replace(" ", "") if style == "llama2" else found == expected


@pytest.mark.parametrize("style", ["chatml", "generation", "llama3", "qwen3"])
def test_system_prompts_are_not_supervised(style, tokenizers):
    assert supervised(chat("u", "answer", system="Be brief."), tokenizers[style]) == "answer" + END[style]


@pytest.mark.parametrize("style,shown", [("chatml", "  padded \n"), ("llama3", "padded"), ("gemma", "padded")])
def test_white_space_is_as_the_template_shows_it(style, shown, tokenizers):
    assert supervised(chat("u", "  padded \n"), tokenizers[style]) == shown + END[style]


def test_reasoning_that_the_template_drops_from_earlier_turns_is_not_supervised_there(tokenizers):
    found = supervised(
        chat("u", "<think>\nhm\n</think>\n\none", "v", "<think>\nso\n</think>\n\ntwo"), tokenizers["qwen3"]
    )
    assert found == "one<|im_end|><think>\nso\n</think>\n\ntwo<|im_end|>"


def test_train_on(tokenizers):
    example = chat("a", "one", "b", "two", system="s")
    assert supervised(example, tokenizers["chatml"], train_on="last-assistant") == "two<|im_end|>"
    everything = supervised(example, tokenizers["chatml"], train_on="all")
    assert everything.startswith("<|im_start|>system") and everything.endswith("two<|im_end|>\n")
    assert not supervised(example_without_system(), tokenizers["llama3"], train_on="all").startswith("<|begin|>")


def example_without_system():
    return chat("a", "one")


@pytest.mark.parametrize(
    "style,example,words",
    [
        ("gemma", Example("f:3", (Message("user", "a"), Message("user", "b"), Message("assistant", "c"))), "alternate"),
        ("llama2", chat("a", "b", system="s"), "no system role"),
    ],
)
def test_a_refused_conversation_names_the_example_and_the_reason(style, example, words, tokenizers):
    with pytest.raises(TemplateError, match=f"{example.where}.*refuses.*{words}"):
        render(example, tokenizers[style])


def test_templates_that_cannot_be_masked_exactly_are_refused(make_tokenizer):
    for template, words in (
        (CHATML.replace("m['content']", "m['content'] | upper"), "exactly once|changes assistant message"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}"), "exactly once"),
        (None, "no chat template"),
    ):
        with pytest.raises(TemplateError, match=words):
            render(chat("a", "some text"), make_tokenizer(template))


def test_a_template_without_an_end_of_turn_supervises_the_answer_alone(make_tokenizer):
    tokenizer = make_tokenizer(NO_END)
    (span,) = render(chat("a", "some text"), tokenizer).spans
    assert span.end_of_turn == "" and supervised(chat("a", "some text"), tokenizer).lstrip() == "some text"


def test_raw_text_and_completions_end_with_eos(tokenizer):
    assert supervised(Example("f:1", prompt="Q: a\nA:", completion=" b"), tokenizer) == " b<|im_end|>"
    assert supervised(Example("f:1", completion="once upon a time"), tokenizer) == "once upon a time<|im_end|>"


def test_bos_is_added_to_raw_text_once(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(**STYLES["llama2"])
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    (raw,) = tokenize_batch([render(Example("f:1", completion="text"), tokenizer)], tokenizer)
    (turns,) = tokenize_batch([render(chat("a", "b"), tokenizer)], tokenizer)
    for tokens in (raw, turns):
        assert tokens.input_ids[0] == bos and not tokens.supervised[0]
        assert (tokens.input_ids == bos).sum() == 1


contents = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(contents, contents.filter(str.strip)), min_size=1, max_size=3),
    st.sampled_from(["chatml", "llama3"]),
)
def test_any_conversation(tokenizers, turns, style):
    trim = str.strip if style == "llama3" else str
    flat = [c for turn in turns for c in turn]
    expected = "".join(trim(answer) + END[style] for _, answer in turns)
    assert supervised(chat(*flat), tokenizers[style]) == expected


def test_json_answers_survive(tokenizers):
    answer = json.dumps({"a": 1, "b": [True, None], "c": 'x"y\\z'})
    assert supervised(chat("u", answer), tokenizers["chatml"]) == answer + "<|im_end|>"
