"""The API through the client that it is for."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

pytest_plugins = ["over_http"]


def client(served, key="any"):
    return openai.OpenAI(base_url=served.url + "/v1", api_key=key, max_retries=0, timeout=20)


@pytest.fixture
def api(serve):
    with serve() as served:
        yield client(served)


ASK = [{"role": "user", "content": "hello there"}]


def test_models(api):
    assert [(m.id, m.model_extra["parent"]) for m in api.models.list()] == [
        ("tiny", None),
        ("first", "tiny"),
        ("second", "tiny"),
    ]
    assert api.models.retrieve("first").model_extra["parent"] == "tiny"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("third")


@pytest.mark.parametrize(
    "model, who",
    [
        ("tiny", "base"),
        ("base", "base"),
        ("first", "first*1"),
        ("tiny:first*0.7+second*-0.3", "first*0.7+second*-0.3"),
        ("base:second + first*2", "second*1+first*2"),
    ],
)
def test_model_names_adapters(api, model, who):
    done = api.chat.completions.create(model=model, messages=ASK)
    assert done.choices[0].message.content.startswith(f"{who} heard")
    assert done.model == model and done.object == "chat.completion"


def test_chat(api):
    done = api.chat.completions.create(model="first", messages=ASK, seed=5, n=3, temperature=0.5, top_p=0.9)
    assert [c.message.content.rpartition(" ")[2] for c in done.choices] == ["5", "6", "7"]
    assert [c.index for c in done.choices] == [0, 1, 2] and {c.finish_reason for c in done.choices} == {"stop"}
    usage = done.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens == int(done.choices[0].message.content.split()[2])  # once, not three times
    assert usage.prompt_tokens_details.cached_tokens == 1


def test_chat_streams_the_same(api):
    whole = api.chat.completions.create(model="first", messages=ASK, seed=5, n=2)
    chunks = list(
        api.chat.completions.create(
            model="first", messages=ASK, seed=5, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    for choice in whole.choices:
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert mine[0].delta.role == "assistant" and [c.finish_reason for c in mine if c.finish_reason] == ["stop"]
    assert chunks[-1].usage == whole.usage and not any(c.usage for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_max_tokens(api):
    for key in ("max_tokens", "max_completion_tokens"):
        done = api.chat.completions.create(model="tiny", messages=ASK, **{key: 2})
        assert done.choices[0].finish_reason == "length" and done.usage.completion_tokens == 2


def test_chat_logprobs(api):
    done = api.chat.completions.create(model="tiny", messages=ASK, logprobs=True, top_logprobs=2)
    content = done.choices[0].logprobs.content
    assert "".join(c.token for c in content) == done.choices[0].message.content
    assert content[0].logprob == -0.5 and len(content[0].top_logprobs) == 2
    assert bytes(b for c in content for b in c.bytes).decode() == done.choices[0].message.content
    chunks = list(api.chat.completions.create(model="tiny", messages=ASK, logprobs=True, stream=True))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in content]


def test_the_text_of_a_completion_goes_on_from_its_prompt(serve):
    with serve() as served:
        client(served).completions.create(model="tiny", prompt="a")
        client(served).chat.completions.create(model="tiny", messages=ASK)
        assert [ticket.request.continues for ticket in served.engine.tickets] == [True, False]


def test_completions(api, tokenizer):
    done = api.completions.create(model="second", prompt=["one", "two words"], n=2, seed=1, max_tokens=64)
    assert [c.index for c in done.choices] == [0, 1, 2, 3]
    assert [c.text.rpartition(" ")[2] for c in done.choices] == ["1", "2", "1", "2"]
    lengths = [len(tokenizer(text)["input_ids"]) for text in ("one", "two words")]
    assert done.usage.prompt_tokens == sum(lengths)
    ids = tokenizer("two words")["input_ids"]
    for prompt in (ids, [ids]):
        by_ids = api.completions.create(model="second", prompt=prompt, seed=1, max_tokens=64)
        assert by_ids.choices[0].text == done.choices[2].text
    assert api.completions.create(model="tiny", prompt="a").usage.completion_tokens == 16


def test_completion_logprobs_stream(api):
    whole = api.completions.create(model="tiny", prompt="one", logprobs=1, max_tokens=64).choices[0]
    assert "".join(whole.logprobs.tokens) == whole.text
    assert whole.text[whole.logprobs.text_offset[3] :].startswith(whole.logprobs.tokens[3])
    chunks = list(api.completions.create(model="tiny", prompt="one", logprobs=1, max_tokens=64, stream=True))
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [t for p in parts for t in p.tokens] == whole.logprobs.tokens
    assert [o for p in parts for o in p.text_offset] == whole.logprobs.text_offset


@pytest.mark.parametrize(
    "options, error, param",
    [
        ({"model": "third"}, openai.NotFoundError, "model"),
        ({"model": "tiny:third*0.5"}, openai.NotFoundError, "model"),
        ({"model": "tiny:first*x"}, openai.BadRequestError, None),
        ({"model": "tiny:first+first"}, openai.BadRequestError, None),
        ({"model": "tiny:first*nan"}, openai.BadRequestError, None),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"temperature": "1"}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"n": 13}, openai.BadRequestError, "n"),  # more than the engine ever takes at once
        ({"max_tokens": 10_000}, openai.BadRequestError, None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias"),
        (
            {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
            openai.BadRequestError,
            "chat_template_kwargs",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            openai.BadRequestError,
            "messages",
        ),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
    ],
)
def test_refusals(api, options, error, param):
    with pytest.raises(error) as raised:
        api.chat.completions.create(**{"model": "tiny", "messages": ASK} | options)
    body = raised.value.body
    assert set(body) == {"message", "type", "param", "code"} and body["message"] and "\n" not in body["message"]
    assert body["param"] == param


def test_what_only_labels_a_request_is_ignored(api):
    harmless = {"user": "me", "metadata": {"a": "b"}, "tools": [], "presence_penalty": 0, "logit_bias": {}}
    assert api.chat.completions.create(model="tiny", messages=ASK, **harmless).choices[0].finish_reason == "stop"


def test_images_are_refused(api):
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(openai.BadRequestError):
        api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part]}])


def test_overload_and_failure(serve):
    with serve() as served:
        api = client(served)
        served.engine.full = True
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as raised:
                api.chat.completions.create(model="tiny", messages=ASK, stream=stream)
            assert raised.value.response.headers["Retry-After"] == "2"
        served.engine.full, served.engine.broken = False, True
        with pytest.raises(openai.InternalServerError, match="it broke"):
            api.chat.completions.create(model="tiny", messages=ASK)
        with pytest.raises(openai.APIError) as raised:  # the headers have left: an event of the stream
            list(api.chat.completions.create(model="tiny", messages=ASK, stream=True))
        assert raised.value.message == "it broke"  # an adapter's fault is not called the engine's


def test_half_accepted_choices_are_given_back(serve):
    with serve(delay=0.01) as served:
        submit, count = served.engine.submit, []

        def third_fails(request):
            count.append(1)
            served.engine.full = len(count) > 2
            return submit(request)

        served.engine.submit = third_fails
        with pytest.raises(openai.RateLimitError):
            client(served).chat.completions.create(model="tiny", messages=ASK, n=3)
        assert len(served.engine.tickets) == 2 and all(t.cancelled for t in served.engine.tickets)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(serve, stream):
    with serve(delay=0.05) as served:
        served.engine.words = 40
        api = client(served).with_options(timeout=0.3)
        with pytest.raises(openai.APITimeoutError):
            found = api.chat.completions.create(model="tiny", messages=ASK, stream=stream, max_tokens=200)
            for _ in found:
                time.sleep(0.1)
                found.response.close()
                raise openai.APITimeoutError(request=found.response.request)
        until = time.monotonic() + 5
        while not served.engine.finished and time.monotonic() < until:
            time.sleep(0.02)
        assert served.engine.tickets[0].cancelled and served.engine.finished["cancelled"] == 1


def test_many_loads_from_a_slow_disk_hold_up_no_answer(serve, monkeypatch):
    with serve() as served, ThreadPoolExecutor(50) as pool:
        disk, load = threading.Event(), served.registry.load
        monkeypatch.setattr(
            served.registry, "load", lambda *given, **options: disk.wait(20) and load(*given, **options)
        )
        api = client(served)
        bodies = [{"lora_name": f"n{n}", "lora_path": str(served.folder)} for n in range(50)]
        loads = [pool.submit(api.post, "/load_lora_adapter", cast_to=str, body=body) for body in bodies]
        try:
            time.sleep(1)
            assert api.with_options(timeout=8).completions.create(model="tiny", prompt="hello").choices
        finally:
            disk.set()
        assert all("Success" in one.result(20) for one in loads)


def test_stopping_lets_answers_finish(serve):
    with serve(delay=0.02) as served:
        stream = client(served).chat.completions.create(model="tiny", messages=ASK, stream=True)
        text = next(stream).choices[0].delta.content
    # the server has stopped: what it had accepted was answered whole
    text += "".join(c.choices[0].delta.content or "" for c in stream)
    assert text.startswith("base heard") and text.endswith("None")
    assert served.engine.finished == {"stop": 1}


def test_json_without_its_library(api, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"pip install 'veneer\[json\]'"):
        api.chat.completions.create(model="tiny", messages=ASK, response_format={"type": "json_object"})
