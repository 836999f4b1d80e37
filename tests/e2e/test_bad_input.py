"""Mistakes: exit code 2 and one line that says what is wrong; never a traceback."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from conftest import tiny_llama

pytest_plugins = ["commands"]


@pytest.fixture
def refused(cli):
    """Run a command that must fail with one line holding all these words."""

    def run(*arguments, words=()):
        done = cli(*arguments)
        assert done.code == 2, done
        assert done.err.count("error:") == 1, done.err
        assert "Traceback" not in done.err and "Traceback" not in done.out
        line = done.err[done.err.index("error:") :]
        assert line.count("\n") == 1, line
        for word in [words] if isinstance(words, str) else words:
            assert word in line, line
        return line

    return run


@pytest.fixture
def train(refused, model_dir, chat_file, tmp_path):
    """A training command that must fail, with some of its flags changed."""

    def run(*more, words=(), **changed):
        flags = {"model": model_dir, "data": chat_file, "out": tmp_path / "run", "rank": 4, "max_steps": 1} | changed
        given = [part for k, v in flags.items() if v is not None for part in (f"--{k.replace('_', '-')}", v)]
        line = refused("train", *given, *more, words=words)
        assert not (tmp_path / "run" / "config.yaml").exists()
        return line

    return run


def written(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = chat(("user", "a"), ("assistant", "b"))


def test_missing_data_names_the_near_miss(train, tmp_path):
    train(data=tmp_path / "chta.jsonl", words=["chta.jsonl", "chat.jsonl"])
    train(data=tmp_path / "no" / "chat.jsonl", words="does not exist")
    train(data=None, words=["data", "required"])


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "holds no rows"),
        ([GOOD, '{"messages": ['], [":2", "broken JSON"]),
        ([GOOD, "[1, 2]"], ":2"),
        ([GOOD, {"messages": "hello"}], ":2"),
        ([{"messages": [{"role": "user", "content": 5}]}], [":1", "content"]),
        ([{"messages": [{"role": "wizard", "content": "a"}]}], [":1", "wizard"]),
        ([{"colour": "red"}], [":1", "colour"]),
    ],
    ids=["empty", "json", "list", "no-turns", "content", "role", "unknown"],
)
def test_bad_rows(train, tmp_path, rows, words):
    train(
        data=written(tmp_path / "bad.jsonl", *rows),
        words=["bad.jsonl", *([words] if isinstance(words, str) else words)],
    )


def test_all_rows_bad(train, tmp_path):
    train("--on-bad-row", "skip", data=written(tmp_path / "bad.jsonl", "{", "["), words=["no usable row", ":1"])


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role, please') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def test_template_that_refuses_the_roles(train, refused, tmp_path, model_dir):
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    train(chat_template=template, words=["no system role, please", "chat.jsonl:1"])
    template.write_text("{% for %}")
    train(chat_template=template, words="template")
    template.write_bytes(b"\xff\xfe")
    train(chat_template=template, words=["t.jinja", "UTF-8"])
    train(chat_template=tmp_path / "no.jinja", words="no.jinja")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--set", "adapter.rnak=3"], ["adapter.rnak", "'rank'"]),
        (["--set", "trian.lr=3"], ["trian", "'train'"]),
        (["--set", "model.lr=3"], "model is not a section"),
        (["--set", "train.lr"], ["KEY=VALUE", "train.lr"]),
        (["--set", "train.lr=[1"], "YAML"),
        (["--rank", "0"], "adapter.rank"),
        (["--lr", "-1"], "train.lr"),
        (["--set", "adapter.dropout=1.5"], "adapter.dropout"),
        (["--set", "train.schedule=spiral"], ["train.schedule", "cosine"]),
        (["--dtype", "int3"], "dtype"),
        (["--device", "cuda:7"], "device"),
        (["--device", "toaster"], ["toaster", "cpu"]),
        (["--on-bad-row", "cry"], "skip"),
        (["--targets", "q_prj,v_proj"], "q_prj"),
        (["--rank", "400"], "rank 400"),
        (["--lr", "inf"], ["train.lr", "finite"]),
        (["--alpha", "inf"], ["adapter.alpha", "finite"]),
        (["--epochs", "inf"], ["train.epochs", "finite"]),
        (["--set", "train.warmup=.inf"], ["train.warmup", "finite"]),
        (["--set", "train.betas=[0.9, 1.0]"], "train.betas"),
        (["--new-tokens", ""], "adapter.new_tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_settings(train, arguments, words):
    train(*arguments, words=words)


@pytest.mark.parametrize(
    "text, words",
    [
        ("model: [", [":1", "broken YAML"]),
        ("- a\n- b\n", "list"),
        ("", "NoneType"),
        ("data: a.jsonl\nout: x\nmodle: y\n", ["'modle'", "'model'"]),
        ("data: a.jsonl\nout: x\nadapter: 5\n", "adapter"),
        ("data: a.jsonl\n", "'out'"),
    ],
    ids=["broken", "list", "empty", "key", "section", "required"],
)
def test_yaml(refused, tmp_path, text, words):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    refused("train", file, words=words)


def test_yaml_that_is_not_there(refused, tmp_path):
    refused("train", tmp_path / "none.yaml", words="none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    refused("train", tmp_path / "b.yaml", words="b.yaml")


def test_models_that_are_none(train, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "my-model")
    train(model=tmp_path / "my-modle", words=["my-modle", "my-model"])
    (tmp_path / "empty").mkdir()
    train(model=tmp_path / "empty", words=["is no model", "config.json"])
    (tmp_path / "fake.gguf").write_bytes(b"no gguf at all")
    train(model=tmp_path / "fake.gguf", words="fake.gguf")
    (tmp_path / "model.bin").write_bytes(b"weights")
    train(model=tmp_path / "model.bin", words="not a single .bin")
    train(model="smollm2-135m-instrukt", words="smollm2-135m-instruct")


@pytest.mark.parametrize(
    "kind", ["LlamaForSequenceClassification", "BertForSequenceClassification", "T5ForConditionalGeneration"]
)
def test_models_of_another_task(train, refused, kind, tokenizer, tmp_path):
    """A tied Llama classifier holds all the weights of a language model: it was trained as one before."""
    import transformers

    made = getattr(transformers, kind)
    sizes = {"vocab_size": 420, "num_hidden_layers": 1, "num_attention_heads": 4, "tie_word_embeddings": True}
    sizes |= {"d_model": 24, "d_kv": 6, "d_ff": 8} if "T5" in kind else {"hidden_size": 24, "intermediate_size": 8}
    made(made.config_class(**sizes)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    train(model=tmp_path / "other", words=[kind, "veneer.attach"])
    refused("chat", "--model", tmp_path / "other", words=kind)


def test_damaged_model(train, model_dir, tmp_path):
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    train(model=broken, words=["broken", "cut short"])
    weights.write_bytes(whole)
    tensors = load_file(weights)
    last = sorted(tensors)[-1]
    save_file({k: v for k, v in tensors.items() if k != last}, weights, metadata={"format": "pt"})
    train(model=broken, words="missing")
    save_file(tensors | {last: tensors[last][:-1].contiguous()}, weights, metadata={"format": "pt"})
    train(model=broken, words="broken")
    (broken / "config.json").write_text("{")
    train(model=broken, words="broken")
    weights.unlink()
    shutil.copy(model_dir / "config.json", broken)
    train(model=broken, words="broken")


def test_hub_out_of_reach(train, monkeypatch):
    train(model="somebody/some-model", words=["somebody/some-model", "HF_HUB_OFFLINE"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("veneer.base.load.hub_reachable", lambda: False)
    train(model="somebody/some-model", words=["cannot be reached", "smollm2-135m-instruct"])


def test_out_that_cannot_be_used(train, tmp_path):
    (tmp_path / "file").write_text("mine")
    train(out=tmp_path / "file", words="file")
    train(out=tmp_path / "file" / "below", words="below")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    train(out=tmp_path / "full", words="not empty")
    assert (tmp_path / "full" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_nothing_left_to_learn(train):
    train(max_length=8, words=["no supervised token", "raise max_length, which is 8"])
    train("--set", "data.on_long=drop", max_length=8, words="longer than max_length")


def test_example_above_the_context(train, tmp_path):
    data = written(tmp_path / "long.jsonl", chat(("user", "7 " * 300), ("assistant", "b")))
    train(data=data, words=["data.max_length", "256"])


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained / "adapter", tmp_path / "adapter")


def ask(refused, adapter, *more, words):
    return refused("generate", adapter, "--prompt", "hi", "--max-new-tokens", 3, *more, words=words)


def test_adapter_tensors(refused, adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    module = first.removeprefix("base_model.model.").partition(".lora_")[0]
    half = {k: v for k, v in tensors.items() if k != first}
    save_file(half, file)
    ask(refused, adapter, words=[module, "lacks lora_A"])
    save_file({k: v for k, v in half.items() if module not in k}, file)
    ask(refused, adapter, words=["missing", module])
    save_file(tensors | {first.replace("layers.0", "layers.9"): tensors[first].clone()}, file)
    ask(refused, adapter, words="layers.9")
    save_file(tensors | {"base_model.model.model.norm.weight": tensors[first].clone()}, file)
    ask(refused, adapter, words="model.norm.weight")
    save_file(tensors | {first: tensors[first][:-1].contiguous()}, file)
    ask(refused, adapter, words=[module, "rank 4"])
    save_file(tensors | {first: tensors[first] * float("nan")}, file)
    ask(refused, adapter, words=[module, "NaN"])


def test_adapter_files(refused, adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) // 2, 4, 0):
        file.write_bytes(whole[:size])
        ask(refused, adapter, words="adapter_model.safetensors")
        refused("info", adapter, words="adapter_model.safetensors")
    file.unlink()
    ask(refused, adapter, words="adapter_model.safetensors")
    file.write_bytes(whole)
    (adapter / "veneer.json").write_text("{")
    ask(refused, adapter, words="veneer.json")
    (adapter / "veneer.json").write_text("[]")
    ask(refused, adapter, words="veneer.json")
    (adapter / "veneer.json").unlink()
    (adapter / "adapter_config.json").write_text("{}")
    ask(refused, adapter, words="--model")
    ask(refused, tmp_path / "nowhere", words="nowhere")
    ask(refused, tmp_path, words="neither")


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("adapter_config.json", {"r": "x"}, ": r is damaged"),
        ("adapter_config.json", {"r": 0}, ": r is damaged"),
        ("adapter_config.json", {"lora_alpha": None}, ": lora_alpha is damaged"),
        ("adapter_config.json", {"rank_pattern": [1]}, ": rank_pattern is damaged"),
        ("adapter_config.json", {"alpha_pattern": {"(": 3}}, "'(' is no regular expression"),
        ("adapter_config.json", {"target_modules": 5}, ": target_modules is damaged"),
        ("veneer.json", {"base": 5}, "veneer.json is damaged: base"),
        ("veneer.json", {"base": {"fingerprint": 5}}, "veneer.json is damaged: base"),
        ("veneer.json", {"config": []}, None),
        ("veneer.json", {"config": "x"}, "veneer.json is damaged: config"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_fields_of_another_type(refused, cli, adapter, model_dir, tmp_path, file, change, words):
    values = json.loads((adapter / file).read_text())
    (adapter / file).write_text(json.dumps(values | change))
    if words is None:
        assert cli("resize", adapter, "--rank", 1, "--out", tmp_path / "out").code == 0
        return
    for command in (("merge", model_dir, adapter), ("combine", adapter, adapter), ("resize", adapter, "--rank", 1)):
        refused(*command, "--out", tmp_path / "out", words=words)
    refused("export", adapter, "--to", "gguf", "--out", tmp_path / "out", words=words)
    refused("generate", adapter, "-p", "hi", "--model", model_dir, words=words)


def test_adapter_on_another_base(refused, cli, trained, adapter, tmp_path, tokenizer, model_dir):
    other = tmp_path / "other"
    tiny_llama(seed=9).save_pretrained(other)
    tokenizer.save_pretrained(other)
    ask(refused, adapter, "--model", other, words=["another base", str(model_dir), "--force"])
    assert cli("generate", adapter, "-p", "hi", "--max-new-tokens", 3, "--model", other, "--force").code == 0
    ask(refused, adapter, "--model", trained / "adapter", words="is an adapter")


def test_a_seed_that_torch_cannot_take(cli, adapter):
    for seed in (-1, 2**64):
        done = cli("generate", adapter, "-p", "hi", "--temperature", 1, "--seed", seed)
        assert done.code == 2 and "--seed" in done.err and "Traceback" not in done.err


def test_no_room_in_the_context(refused, adapter):
    refused("generate", adapter, "--prompt", "7 " * 300, "--max-new-tokens", 3, words=["context of 256", "prompt 1"])
    refused("generate", adapter, "--prompt", "hi", "--max-new-tokens", 300, words="--max-new-tokens")


def test_prompts(refused, adapter, tmp_path):
    refused("generate", adapter, words="--prompt")
    refused("generate", "--prompt", "hi", words="--model")
    refused("chat", words="--model")
    refused("generate", adapter, "--prompts", tmp_path / "none.txt", words="none.txt")
    refused("generate", adapter, "--prompts", written(tmp_path / "e.txt", ""), words="no prompt")
    refused("generate", adapter, "--prompts", written(tmp_path / "b.jsonl", '"a"', "{"), words="b.jsonl:2")
    refused("generate", adapter, "--prompts", written(tmp_path / "c.jsonl", {"text": "a"}), words="c.jsonl:1")
    bad = written(tmp_path / "d.jsonl", {"messages": [{"role": "user", "content": None}]})
    refused("generate", adapter, "--prompts", bad, words="d.jsonl:1")
    bad = written(tmp_path / "e.jsonl", {"messages": [{"role": "assistant", "content": "a"}]})
    refused("generate", adapter, "--prompts", bad, words="e.jsonl:1")


def test_eval(refused, adapter, conversations, tmp_path):
    refused("eval", adapter, "--data", tmp_path / "none.jsonl", words="none.jsonl")
    refused("eval", tmp_path / "none", words="none")
    data = conversations(tmp_path / "d.jsonl", 2)
    refused("eval", adapter, "--data", data, "--device", "toaster", words="toaster")


def test_inspect(refused, model_dir, conversations, tmp_path):
    refused("data", "inspect", tmp_path / "none.jsonl", "--model", model_dir, words="none.jsonl")
    data = conversations(tmp_path / "d.jsonl", 2)
    refused("data", "inspect", data, "--model", model_dir, "--format", "xml", words="format")


def test_places_where_nothing_can_be_written(refused, adapter, model_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "x"
    for command in (
        ("merge", model_dir, adapter),
        ("combine", adapter, adapter),
        ("resize", adapter, "--rank", 1),
        ("export", adapter, "--to", "gguf"),
        ("export", adapter, "--to", "mlx"),
    ):
        refused(*command, "--out", out, words="file")
    step = ("bench", model_dir, "--rank", 2, "--batch", 1, "--length", 8, "--steps", 1)
    refused(*step, "--trace", tmp_path, words=["cannot write", "directory"])
    assert (tmp_path / "file").read_text() == "mine"


def test_numbers_that_no_run_can_use(train, refused, adapter, tmp_path):
    train("--epochs", "1e300", max_steps=None, words="no run ends that")
    train("--invocation", "99999", words="99999 is no token of the model")
    weights = tmp_path / "w.yaml"
    weights.write_text("[1, 2]")
    refused(
        "combine", adapter, adapter, "--weights", weights, "--out", tmp_path / "o", words=["weights by layer", "list"]
    )
