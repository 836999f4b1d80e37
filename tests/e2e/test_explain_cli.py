"""veneer explain through the command line: the field's own examples, an adapter, a run, the page, mistakes."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

pytest_plugins = ["commands"]

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float16",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MIXTRAL_8X7B = LLAMA_2_7B | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "dtype": "bfloat16",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "max_position_embeddings": 32768,
}


@pytest.fixture
def model(tmp_path):
    """`model(values)`: a folder with just that config.json."""

    def make(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return make


def as_json(done):
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out)


def test_seven_billion(cli, model):
    found = as_json(cli("explain", model(LLAMA_2_7B), "--rank", 16, "--targets", "q_proj,v_proj", "--json"))
    assert found["base_parameters"] == 6_738_415_616
    assert found["trainable_parameters"] == 64 * 131_072 and found["total_parameters"] == 6_738_415_616 + 64 * 131_072
    for target in found["targets"]:
        assert (target["d_out"], target["d_in"]) == (4096, 4096)
        assert (target["full_parameters"], target["lora_parameters"]) == (16_777_216, 131_072)
        assert round(target["reduction"], 3) == 0.992
    assert found["memory"]["full"]["gradients"] == 4 * 6_738_415_616  # 28 GB for a round 7 billion
    assert found["memory"]["lora"]["gradients"] == 4 * found["trainable_parameters"]
    linears = 6_738_415_616 - 2 * 32000 * 4096 - 65 * 4096
    nf4 = found["memory"]["qlora"]["weights"] - 4 * found["trainable_parameters"] - 2 * (6_738_415_616 - linears)
    assert nf4 / linears == pytest.approx(0.5159, abs=1e-4)
    assert 4 * found["trainable_parameters"] < found["adapter_bytes"] < 4 * found["trainable_parameters"] + 40_000
    groups = {group["name"]: group["modules"] for group in found["groups"]}
    assert groups == {"q_proj": 32, "v_proj": 32}


def test_seven_billion_as_text(cli, model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    done = cli("explain", model(LLAMA_2_7B), "--rank", 16, "--alpha", 32)
    assert done.code == 0
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert all(word in lines["q_proj"] for word in ("4096 × 4096", "16 × 4096", "16,777,216", "131,072", "99.2%"))
    assert "27 GB" in lines["gradients"] and "160 MB" in lines["gradients"]
    assert "the output head" in lines["lm_head"] and "0.59%" in lines["trained"]
    assert lines["→"].split() == ["→", "16", "1", "2", "4", "4", "8", "16"]


def test_a_mixture_names_its_experts(cli, model):
    folder = model(MIXTRAL_8X7B)
    found = as_json(cli("explain", folder, "--targets", "attention", "--json"))
    assert found["base_parameters"] == 46_702_792_704
    experts = {group["name"]: group for group in found["left_out"] if "experts" in group["reason"]}
    assert experts.keys() == {"gate_up_proj", "down_proj"}
    assert sum(group["parameters"] for group in experts.values()) == 32 * 8 * 3 * 4096 * 14336
    settings = ("--set", "adapter.target_parameters=[experts.down_proj]", "--set", "adapter.rank=4", "--json")
    target = as_json(cli("explain", folder, "--targets", "q_proj", *settings))["targets"][-1]
    assert (target["kind"], target["experts"], target["lora_parameters"]) == ("parameter", 8, 8 * 4 * (4096 + 14336))
    assert target["full_parameters"] == 8 * 4096 * 14336


def test_every_setting_of_the_adapter(cli, model):
    settings = [
        "adapter.dora=true",
        "adapter.rslora=true",
        "adapter.trainable_tokens=[1, 2, 3]",
        "adapter.rank_pattern={k_proj: 8}",
        "adapter.init_options.eva_rho=1.5",
        "adapter.init=eva",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    found = as_json(cli("explain", model(LLAMA_2_7B), "--targets", "k_proj", *flags, "--json"))
    assert found["trained_by_part"] == {
        "lora_A": 32 * 8 * 4096,
        "lora_B": 32 * 8 * 4096,
        "lora_magnitude_vector": 32 * 4096,
        "trainable_tokens": 3 * 4096,
    }
    assert found["targets"][0]["scaling"] == pytest.approx(32 / 8**0.5)


def test_the_default_model_before_it_is_fetched(cli):
    assert as_json(cli("explain", "smollm2-135m-instruct", "--json"))["trainable_parameters"] == 4_884_480


def test_a_run_and_its_page(cli, trained, model_dir, tmp_path):
    page = tmp_path / "page.html"
    found = as_json(cli("explain", trained, "--page", page, "--json"))
    assert found["base"] == str(model_dir) and found["summary"]["layers"] == 14
    assert 0 < found["summary"]["relative_norm"] < 1 and 1 <= found["summary"]["rank_99"] <= 4
    file = trained / "adapter" / "adapter_model.safetensors"
    assert found["adapter_bytes"] == file.stat().st_size
    assert found["trainable_parameters"] == sum(t.numel() for t in load_file(file).values())
    assert page.read_text(encoding="utf-8").count("<svg") == 4
    said = as_json(cli("explain", model_dir, "--rank", 4, "--json"))
    assert said["trainable_parameters"] == found["trainable_parameters"]
    assert said["adapter_bytes"] == found["adapter_bytes"]
    text = cli("explain", trained / "adapter", "--base", model_dir, "--page", page)
    assert text.code == 0 and "would keep 99 %" in text.out and f"wrote {page}" in text.out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["explain", "nowhere/at-all"], ["nowhere/at-all"]),
        (["explain", "./nowhere"], ["no such directory"]),
        (["explain", "MODEL", "--targets", "q_porj"], ["q_porj", "q_proj"]),
        (["explain", "MODEL", "--rank", "0"], ["rank"]),
        (["explain", "MODEL", "--set", "adapter.rnk=4"], ["rnk", "did you mean 'rank'"]),
        (["explain", "MODEL", "--set", "adapter.lora_alpha=4"], ["lora_alpha", "did you mean 'alpha'"]),
        (["explain", "MODEL", "--set", "train.lr=1"], ["train.lr", "settings of the adapter"]),
        (["explain", "MODEL", "--set", "adapter.rank=8", "--set", "adapter.rank.x=8"], ["rank is not a section"]),
        (["explain", "MODEL", "--set", "adapter.new_tokens=[<a>]"], ["tokenizer"]),
        (["explain", "MODEL", "--page", "x.html"], ["--page is for an adapter or a run"]),
        (["explain", "MODEL", "--dtype", "int4"], ["int4", "bfloat16"]),
        (["explain", "RUN", "--rank", "8"], ["leave them out"]),
        (["explain", "RUN", "--base", "./nowhere"], ["no such directory"]),
        (["explain", "RUN", "--page", "/dev/null/x.html"], ["cannot write"]),
    ],
)
def test_mistakes(cli, model, trained, arguments, words):
    places = {"MODEL": model(LLAMA_2_7B), "RUN": trained}
    done = cli(*(places.get(argument, argument) for argument in arguments))
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1 and done.err.startswith("error:"), done.err
    assert all(word in done.err for word in words), done.err


def test_a_damaged_adapter(cli, trained, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((trained / "adapter" / "adapter_config.json").read_bytes())
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    tensors.pop(next(key for key in tensors if "lora_B" in key))
    save_file(tensors, folder / "adapter_model.safetensors")
    done = cli("explain", folder)
    assert done.code == 2 and "lacks lora_B" in done.err
