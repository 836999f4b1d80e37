"""`veneer serve` as a process, with the engine on a tiny model; and what it refuses before it loads anything."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from conftest import tiny_llama
from veneer.adapter.attach import attach
from veneer.base.generate import generate
from veneer.config import AdapterConfig
from veneer.formats.peft import load_adapter, save_adapter

pytest_plugins = ["commands"]
ASK = [{"role": "user", "content": "hello there"}]


def make_adapter(path, *, seed, **options):
    import torch

    model = tiny_llama()
    bank = attach(model, AdapterConfig(**{"rank": 4} | options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in bank.parameters("default").items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return save_adapter(model, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(folder / "one", seed=1)
    make_adapter(folder / "two", seed=2, alpha=8)
    return folder


SLOW = (
    "import time, uvicorn\nrun = uvicorn.Server.run\nuvicorn.Server.run = lambda *a, **k: (time.sleep(1), run(*a, **k))"
)


@pytest.fixture(scope="module")
def started(model_dir, folder):
    """(process, address, how a client fared that came as soon as the address was said, a second before it is listened to):
    started once, stopped by SIGTERM in the last test."""
    code = f"import torch; torch.set_num_threads(1)\n{SLOW}\nfrom veneer.cli.main import main\nmain()"
    command = [sys.executable, "-c", code, "serve", str(model_dir), "--adapters", str(folder), "--port", "0"]
    command += ["--slots", "4", "--context", "256", "--name", "tiny", "--device", "cpu"]
    environment = os.environ | {"VENEER_API_KEY": "k"}
    process, said = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment), ""
    try:
        while not (found := re.search(r"tiny and 2 adapters at (http://127\.0\.0\.1:(\d+))", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        try:
            socket.create_connection(("127.0.0.1", int(found[2])), timeout=20).close()
            fared = "served"
        except OSError as error:
            fared = repr(error)
        yield process, found[1], fared
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(started):
    """(process, client)"""
    process, address, _ = started
    return process, openai.OpenAI(base_url=address + "/v1", api_key="k", max_retries=0, timeout=60)


def test_a_client_that_comes_at_once_waits(started):
    assert started[2] == "served"


def alone(model_dir, tokenizer, adapter, count):
    """What one adapter answers by itself, from the library."""
    from veneer.base.load import load_base

    model, tokenizer = load_base(model_dir, device="cpu")
    if adapter:
        load_adapter(model, adapter, trainable=False)
    return generate(model, tokenizer, [ASK], max_new_tokens=count)[0].text


def test_mixed_answers_equal_those_alone(server, model_dir, folder, tokenizer):
    _, client = server

    def ask(model):
        done = client.chat.completions.create(model=model, messages=ASK, temperature=0, max_tokens=20)
        return done.choices[0].message.content

    asked = ["tiny", "one", "two", "one", "base:two*1", "tiny"]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, asked))
    truth = {
        name: alone(model_dir, tokenizer, path, 20) for name, path in (("one", folder / "one"), ("two", folder / "two"))
    }
    truth |= {"tiny": alone(model_dir, tokenizer, None, 20), "base:two*1": truth["two"]}
    assert found == [truth[name] for name in asked]
    assert len(set(truth.values())) == 3


def test_seeds_and_stops(server):
    _, client = server

    def ask(**options):
        options = {"model": "one", "prompt": "hello", "max_tokens": 30, "temperature": 1.0} | options
        return client.completions.create(**options).choices[0]

    assert ask(seed=3).text == ask(seed=3).text != ask(seed=4).text
    whole = ask(temperature=0).text
    stop = whole[5:7]
    cut = ask(temperature=0, stop=[stop])
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    chunks = client.completions.create(
        model="one", prompt="hello", max_tokens=30, temperature=0, stop=stop, stream=True
    )
    assert "".join(c.choices[0].text for c in chunks) == cut.text


def test_json_schema(server):
    _, client = server
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}, "ok": {"type": "boolean"}},
        "required": ["kind", "ok"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    for seed in range(3):  # a random model: only the grammar can make this JSON
        done = client.chat.completions.create(
            model="one", messages=ASK, max_tokens=60, seed=seed, n=2, response_format=wanted
        )
        for choice in done.choices:
            found = json.loads(choice.message.content)
            assert found.keys() == {"kind", "ok"} and choice.finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="schema cannot be followed"):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wobble"}}}
        client.chat.completions.create(model="one", messages=ASK, response_format=wanted)


def test_reload_never_answers_with_old_weights(server, folder, model_dir, tokenizer):
    _, client = server
    ask = {"model": "changing", "prompt": "hello there", "temperature": 0, "max_tokens": 12}

    def load(path, **more):
        client.post("/load_lora_adapter", cast_to=str, body={"lora_name": "changing", "lora_path": str(path)} | more)

    load(folder / "one")
    first = client.completions.create(**ask).choices[0].text
    load(folder / "two", load_inplace=True)
    second = client.completions.create(**ask).choices[0].text
    assert first == client.completions.create(**ask | {"model": "one"}).choices[0].text
    assert second == client.completions.create(**ask | {"model": "two"}).choices[0].text != first
    client.post("/unload_lora_adapter", cast_to=str, body={"lora_name": "changing"})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**ask)


def test_prompt_too_long(server):
    _, client = server
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="one", prompt="word " * 400, max_tokens=5)
    assert raised.value.code == "context_length_exceeded"


def test_metrics(server):
    _, client = server
    text = client.get("/metrics".replace("/", "/../", 1), cast_to=str)
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(text)}
    count = {name: family.samples[0].value for name, family in families.items()}
    assert count["veneer_tokens_generated"] > 100 and count["veneer_slots"] == 4
    first = {s.labels.get("le"): s.value for s in families["veneer_time_to_first_token_seconds"].samples}
    assert first["+Inf"] == sum(s.value for s in families["veneer_requests"].samples) > 10
    routes = {s.labels["route"] for s in families["veneer_http_requests"].samples}
    assert {"/v1/completions", "/v1/chat/completions"} <= routes <= {"other", *routes}


def test_sigterm_finishes_what_runs(server):
    process, client = server
    stream = client.completions.create(
        model="one", prompt="hello", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    process.send_signal(signal.SIGTERM)
    last = [chunk.choices[0].finish_reason for chunk in stream][-1]
    assert last == "length"
    assert process.wait(30) == 0
    assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--adapters", "{tmp}/none"], "no such directory"),
        (["--adapters", "{tmp}"], "holds no adapter"),
        (["--allow", "{tmp}/none"], "no such directory"),
        (["--host", "256.1.1.1"], "cannot bind"),
        (["--port", "{taken}"], "cannot bind"),
        (["--engine", "other"], "use veneer or vllm"),
        (["--print"], "--engine vllm"),
        (["--name", "a:b"], "the base's name"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(cli, tmp_path, arguments, said):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [a.format(tmp=tmp_path, taken=taken.getsockname()[1]) for a in arguments]
        started = time.monotonic()
        done = cli("serve", "no-such-model-anywhere", *words)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err
    assert time.monotonic() - started < 30


def test_two_adapters_of_one_name(cli, tmp_path):
    for place in ("a", "b"):
        make_adapter(tmp_path / place / "same", seed=1)
    done = cli("serve", "m", "--adapters", tmp_path / "a", "--adapters", tmp_path / "b")
    assert done.code == 2 and "both be called 'same'" in done.err
    for name in ("same", "base"):
        (tmp_path / "a" / "same").rename(tmp_path / "a" / name)
        done = cli("serve", "same", "--adapters", tmp_path / "a")
        assert done.code == 2 and "has the base's name" in done.err
        (tmp_path / "a" / name).rename(tmp_path / "a" / "same")


class TestVllm:
    """What is handed over to vLLM, against the rules of its loader and its command line."""

    RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

    def command(self, cli, model_dir, folder, out, *more):
        done = cli("serve", model_dir, "--adapters", folder, "--engine", "vllm", "--print", "--export-to", out, *more)
        assert done.code == 0, done.err
        return shlex.split(done.out), done

    def options(self, command):
        """--key value… as a dict of lists."""
        found = {}
        for word in command[3:]:
            if word.startswith("--"):
                values = found[word] = []
            else:
                values.append(word)
        return found

    def test_command_and_files(self, cli, model_dir, tmp_path):
        make_adapter(tmp_path / "all" / "plain", seed=1, rank=3)
        make_adapter(tmp_path / "all" / "rs", seed=2, rank=9, rslora=True, rank_pattern={"q_proj": 5})
        command, done = self.command(cli, model_dir, tmp_path / "all", tmp_path / "out,=x", "--name", "org/tiny")
        options = self.options(command)
        assert command[:3] == ["vllm", "serve", str(model_dir)]
        assert options["--enable-lora"] == [] and options["--max-lora-rank"] == ["16"]
        assert options["--host"] == ["127.0.0.1"] and options["--served-model-name"] == ["org/tiny"]
        assert options["--max-loras"] == options["--max-cpu-loras"] == ["2"]
        modules = [json.loads(word) for word in options["--lora-modules"]]  # "," and "=" in a path: no name=path
        assert [m["name"] for m in modules] == ["plain", "rs"]
        for module in modules:
            config = json.loads(open(f"{module['path']}/adapter_config.json").read())
            assert config["r"] in self.RANKS and config["r"] <= 16
            assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["modules_to_save"]
            assert not config["use_dora"] and config["bias"] == "none" and isinstance(config["target_modules"], list)

    def test_the_same_answers(self, cli, model_dir, tmp_path, tokenizer):
        made = make_adapter(tmp_path / "all" / "rs", seed=2, rank=9, rslora=True, rank_pattern={"q_proj": 5})
        command, _ = self.command(cli, model_dir, tmp_path / "all", tmp_path / "out")
        name, _, path = self.options(command)["--lora-modules"][0].partition("=")
        assert name == "rs"
        assert alone(model_dir, tokenizer, path, 8) == alone(model_dir, tokenizer, made, 8)

    def test_written_once_and_anew_when_changed(self, cli, model_dir, tmp_path):
        made = make_adapter(tmp_path / "all" / "a", seed=1)
        first, _ = self.command(cli, model_dir, tmp_path / "all", tmp_path / "out")
        again, _ = self.command(cli, model_dir, tmp_path / "all", tmp_path / "out")
        assert first == again and len(list((tmp_path / "out").iterdir())) == 1
        make_adapter(tmp_path / "b" / "a", seed=5)
        (made / "adapter_model.safetensors").write_bytes((tmp_path / "b/a/adapter_model.safetensors").read_bytes())
        assert self.command(cli, model_dir, tmp_path / "all", tmp_path / "out")[0] != first

    def test_the_key_is_on_no_command_line(self, cli, model_dir, folder, tmp_path):
        command, done = self.command(cli, model_dir, folder, tmp_path / "out", "--api-key", "secret")
        assert "secret" not in done.out + done.err and "VLLM_API_KEY" in done.err

    def test_not_installed(self, cli, model_dir, folder, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        done = cli("serve", model_dir, "--adapters", folder, "--engine", "vllm")
        assert done.code == 2 and "vllm is not installed" in done.err

    def test_hands_over_by_exec(self, cli, model_dir, folder, tmp_path, monkeypatch):
        """A stand-in for vllm: the process becomes it, with the key in the environment."""
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "vllm").write_text('#!/bin/sh\necho "$VLLM_API_KEY" "$@"\n')
        (tmp_path / "bin" / "vllm").chmod(0o755)
        arguments = ["serve", str(model_dir), "--adapters", str(folder), "--engine", "vllm", "--api-key", "secret"]
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VENEER_CACHE": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-m", "veneer", *arguments], capture_output=True, text=True, env=environment, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"secret serve {model_dir} ") and "--enable-lora" in done.stdout
