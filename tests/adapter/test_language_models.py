"""What only whole language models show: tied heads, trained and new tokens, fused experts, activated LoRA."""

import json
import warnings

import pytest
import torch

import veneer
from conftest import tiny_llama
from veneer.adapter.invocation import acting_tokens
from veneer.adapter.layers import AdaptedExperts, AdaptedModule
from veneer.errors import AdapterStateError, ConfigError, TargetError

IDS = torch.tensor([[3, 5, 7, 8, 21, 34, 7], [8, 13, 7, 8, 7, 8, 2]])


def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def randomise(bank, name="default", spread=0.3):
    torch.manual_seed(5)
    for p in bank.parameters(name).values():
        p.data += spread * torch.randn_like(p)


def moe(seed=0, **options):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    values = dict(
        vocab_size=60, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=5, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**values | options)).eval()


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "rank": 3}


def test_experts_add_each_experts_own_update_and_form_no_dense_delta(monkeypatch):
    model, merged = moe(), moe()
    bank = veneer.attach(model, veneer.AdapterConfig(alpha=5, **EXPERTS))
    randomise(bank)
    assert isinstance(model.model.layers[0].mlp.experts, AdaptedExperts) and len(bank.layers) == 4
    with torch.no_grad():
        for path, layer in bank.layers.items():
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            weight = merged.get_parameter(path)
            for e in range(5):  # PEFT's layout: A's rows by expert, B's columns with the expert innermost
                weight[e] += 5 / 3 * b[:, e::5] @ a[3 * e : 3 * e + 3]
    monkeypatch.setattr(type(layer), "delta", lambda *_: pytest.fail("a dense delta"))
    y = logits(model)
    torch.testing.assert_close(y, logits(merged), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    mine = {key: p.grad for key, p in bank.parameters("default").items()}
    y = logits(merged.requires_grad_(True))
    y.square().sum().backward()
    for key, grad in mine.items():  # ∂L/∂A_e = s B_eᵀ ∂L/∂W_e and ∂L/∂B_e = s ∂L/∂W_e A_eᵀ
        path, _, leaf = key.rpartition(".")
        layer, dense = bank.layers[path], merged.get_parameter(path).grad
        a, b = layer.by_expert("default")
        if leaf == "lora_A":
            wanted = 5 / 3 * torch.bmm(b.transpose(1, 2), dense).reshape(grad.shape)
        else:
            wanted = (5 / 3 * torch.bmm(dense, a.transpose(1, 2))).permute(1, 2, 0).reshape(grad.shape)
        torch.testing.assert_close(grad, wanted.detach(), rtol=1e-3, atol=1e-5, msg=key)


def test_experts_merge_restore_and_stack():
    model = moe()
    base = logits(model)
    bank = veneer.attach(model, veneer.AdapterConfig(**EXPERTS))
    veneer.attach(model, veneer.AdapterConfig(target_modules=["q_proj"], rank=2), name="two")
    randomise(bank), randomise(bank, "two")
    bank.activate({"default": 0.7, "two": -1.0})
    live = logits(model)
    bank.merge()
    torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-5)
    bank.unmerge()
    assert torch.equal(logits(model), live)
    with pytest.raises(AdapterStateError, match="cannot be routed by row"), bank.route(["default", None]):
        logits(model)
    veneer.detach(model)
    assert torch.equal(logits(model), base)


def test_a_router_is_a_parameter_target_and_a_linears_weight_is_not():
    model, merged = moe(), moe()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2, target_modules=[], target_parameters=["mlp.gate.weight"]))
    randomise(bank)
    with torch.no_grad():
        for path, layer in bank.layers.items():
            merged.get_parameter(path).add_(layer.delta("default"))
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-5)
    for wrong, words in (
        ("q_proj.weight", "name .*q_proj in target_modules"),
        ("gate_up", "near misses: gate_up_proj"),
    ):
        with pytest.raises(TargetError, match=words):
            veneer.attach(moe(), veneer.AdapterConfig(rank=2, target_modules=[], target_parameters=[wrong]))


@pytest.mark.parametrize("tied_head", ["both", "embedding"])
def test_an_adapted_embedding_with_a_tied_head(tied_head, tmp_path):
    model, merged = tiny_llama(), tiny_llama()
    config = veneer.AdapterConfig(rank=4, target_modules=["embed_tokens"], tied_head=tied_head)
    bank = veneer.attach(model, config)
    randomise(bank)
    live = logits(model)
    with torch.no_grad():
        total = merged.model.embed_tokens.weight + bank.layers["model.embed_tokens"].delta("default")
        merged.model.embed_tokens.weight = torch.nn.Parameter(total)
        if tied_head == "both":
            merged.lm_head.weight = merged.model.embed_tokens.weight
    torch.testing.assert_close(live, logits(merged), rtol=1e-4, atol=1e-4)
    veneer.save_adapter(model, tmp_path / "adapter")
    again = tiny_llama()
    veneer.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), live)
    whole = veneer.merge(model)
    whole.save_pretrained(tmp_path / "merged")
    reloaded = type(whole).from_pretrained(tmp_path / "merged")
    assert reloaded.config.tie_word_embeddings == (tied_head == "both")
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == (tied_head == "both")
    torch.testing.assert_close(logits(reloaded), live, rtol=1e-4, atol=1e-4)


def test_a_tied_head_is_a_choice():
    with pytest.raises(TargetError, match="tied_head: both .* or tied_head: embedding"):
        veneer.attach(tiny_llama(), veneer.AdapterConfig(rank=4, target_modules=["embed_tokens"]))
    with pytest.raises(TargetError, match="not defined with dora"):
        veneer.attach(
            tiny_llama(), veneer.AdapterConfig(rank=4, target_modules=["embed_tokens"], tied_head="both", dora=True)
        )
    veneer.attach(tiny_llama(tie_word_embeddings=False), veneer.AdapterConfig(rank=4, target_modules=["embed_tokens"]))


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_change_their_rows_alone(tied, tmp_path):
    model, wanted = tiny_llama(tie_word_embeddings=tied), tiny_llama(tie_word_embeddings=tied)
    tokens = [7, 21] if tied else {"embed_tokens": [7, 21], "lm_head": [21, 7]}
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2, target_modules=["q_proj"], trainable_tokens=tokens))
    before = logits(model)
    torch.testing.assert_close(before, logits(wanted), rtol=1e-5, atol=1e-5)
    rows = {k: p for k, p in bank.parameters("default").items() if k.endswith("trainable_tokens")}
    assert [tuple(p.shape) for p in rows.values()] == [(2, 36)] * (1 if tied else 2)
    with torch.no_grad():
        for key, p in rows.items():
            p += torch.randn_like(p)
            order = [7, 21] if "embed" in key else [21, 7]
            wanted.get_submodule(key.rpartition(".")[0]).weight[order] = p
    live = logits(model)
    torch.testing.assert_close(live, logits(wanted), rtol=1e-4, atol=1e-4)
    live.square().sum().backward()
    logits(wanted.requires_grad_(True)).square().sum().backward()
    for key, p in rows.items():
        order = [7, 21] if "embed" in key else [21, 7]
        dense = wanted.get_submodule(key.rpartition(".")[0]).weight.grad[order]
        torch.testing.assert_close(p.grad, dense, rtol=1e-3, atol=1e-4)
    veneer.save_adapter(model, tmp_path / "a")
    again = tiny_llama(tie_word_embeddings=tied)
    veneer.load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), live)
    torch.testing.assert_close(logits(veneer.merge(model)), live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"trainable_tokens": [420]}, "token id 420 is beyond its 420 rows"),
        ({"trainable_tokens": [3, 3]}, "given twice"),
        ({"trainable_tokens": {"q_proj": [3]}}, "no embedding or output head"),
        ({"trainable_tokens": [3], "target_modules": ["embed_tokens"], "tied_head": "both"}, "target_modules too"),
    ],
)
def test_mistaken_tokens_are_refused(options, words):
    with pytest.raises(TargetError, match=words):
        veneer.attach(tiny_llama(), veneer.AdapterConfig(rank=2, **options))


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_grow_the_vocabulary_and_come_back_with_the_adapter(tied, make_tokenizer, tmp_path):
    tokenizer, old = make_tokenizer(), None
    rows = len(tokenizer)
    model = tiny_llama(vocab_size=rows, tie_word_embeddings=tied)
    old = logits(model, IDS % rows)
    with pytest.raises(ConfigError, match="'<call>'.*pass tokenizer"):
        veneer.attach(model, veneer.AdapterConfig(rank=2, new_tokens=["<call>"]))
    config = veneer.AdapterConfig(rank=2, target_modules=["q_proj"], new_tokens=["<call>", "</call>"])
    bank = veneer.attach(model, config, tokenizer=tokenizer)
    assert tokenizer.encode("<call>") == [rows] and model.get_input_embeddings().weight.shape[0] == rows + 2
    torch.testing.assert_close(logits(model, IDS % rows)[..., :rows], old, rtol=1e-5, atol=1e-5)
    matrices = [k for k in bank.parameters("default") if k.endswith("trainable_tokens")]
    assert len(matrices) == (1 if tied else 2)
    randomise(bank)
    ids = torch.tensor([[rows, 5, rows + 1]])
    live = logits(model, ids)
    veneer.save_adapter(model, tmp_path / "a", tokenizer=tokenizer)
    fresh = make_tokenizer()
    again = tiny_llama(vocab_size=rows, tie_word_embeddings=tied)
    with pytest.raises(AdapterStateError, match="brings new tokens"):
        veneer.load_adapter(again, tmp_path / "a")
    veneer.load_adapter(again, tmp_path / "a", tokenizer=fresh)
    assert fresh.encode("</call>") == [rows + 1] and torch.equal(logits(again, ids), live)
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["trainable_token_indices"]
    assert set(saved) == {"model.embed_tokens"} | (set() if tied else {"lm_head"})


def test_where_an_activated_adapter_acts():
    assert acting_tokens(IDS, [7, 8]).tolist() == [[False] * 2 + [True] * 5, [False] * 4 + [True] * 3]
    assert not acting_tokens(IDS, [8, 9]).any() and not acting_tokens(IDS[:, :1], [3, 5]).any()


def test_an_activated_adapter_leaves_what_comes_before_to_the_base_and_generates_as_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model, base = tiny_llama(), tiny_llama()
    config = veneer.AdapterConfig(rank=3, invocation=[7, 8])
    bank = veneer.attach(model, config)
    randomise(bank, spread=1.0)
    y, y0 = logits(model), logits(base)
    torch.testing.assert_close(y[0, :2], y0[0, :2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[1, :4], y0[1, :4], rtol=1e-5, atol=1e-5)
    assert (y[0, 2:] - y0[0, 2:]).abs().amax(-1).min() > 1e-3
    veneer.save_adapter(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a").eval()
    torch.testing.assert_close(y, theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=IDS, **options), theirs.generate(input_ids=IDS, **options))
    with pytest.raises(AdapterStateError, match="call the model with input_ids"):
        model(inputs_embeds=torch.randn(1, 3, 36))
    with pytest.raises(AdapterStateError, match="cannot be merged"):
        bank.merge()
    with bank.route(["default", None]):
        rows = logits(model)
    torch.testing.assert_close(rows[0], y[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(rows[1], y0[1]) or torch.allclose(rows[1], y0[1], atol=1e-6)
    bank.remove("default")
    assert not bank.routing.tokens
    torch.testing.assert_close(logits(model), y0)


def test_an_invocation_that_the_model_writes_itself_is_seen_across_cached_calls():
    model = tiny_llama()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=3, invocation=[7, 8]))
    randomise(bank, spread=1.0)
    whole = logits(model, IDS[:1])
    cache, parts = None, []
    for t in range(IDS.shape[1]):
        out = model(input_ids=IDS[:1, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    stepwise = torch.cat(parts, 1)
    # "7" was read by the base before "8" made it an invocation; from then on both agree but for that key and value
    torch.testing.assert_close(stepwise[:, :2], whole[:, :2], rtol=1e-4, atol=1e-5)
    assert bank.routing.tokens["default"].all()


def test_classifiers_train_their_new_head_in_full():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=30, vocab_size=50)
    model = BertForSequenceClassification(config).eval()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2))
    assert "classifier" not in bank.layers
    assert {"classifier.weight", "classifier.bias"} <= set(bank.parameters("default"))
    out = model(input_ids=IDS % 50, labels=torch.tensor([0, 1]))
    out.loss.backward()
    assert bank.parameters("default")["classifier.weight"].grad.abs().sum() > 0
    chosen = veneer.AdapterConfig(rank=2, target_modules=["query", "classifier"])
    named = veneer.attach(BertForSequenceClassification(config), chosen)
    assert "classifier" in named.layers and not named.entries["default"].modules


def test_detach_leaves_no_trace_of_any_kind():
    model = moe(tie_word_embeddings=True)
    modules, flags = dict(model.named_modules()), [(n, p.requires_grad) for n, p in model.named_parameters()]
    base = logits(model)
    veneer.attach(model, veneer.AdapterConfig(trainable_tokens=[3], invocation=None, **EXPERTS))
    veneer.attach(
        model, veneer.AdapterConfig(rank=2, target_modules=["embed_tokens", "q_proj"], tied_head="both"), name="two"
    )
    veneer.detach(model)
    assert dict(model.named_modules()) == modules and torch.equal(logits(model), base)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags
    assert not any(isinstance(m, AdaptedModule) for m in model.modules())


def test_a_deep_copy_is_a_model_of_its_own():
    """As trainers with a reference model make it: its bank steers the copy and leaves the original alone."""
    import copy

    model = tiny_llama()
    base = logits(model)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=3, invocation=[7, 8]))
    veneer.attach(model, veneer.AdapterConfig(rank=2, trainable_tokens=[7], target_modules=["q_proj"]), name="two")
    randomise(bank), randomise(bank, "two")
    live = logits(model)
    twin = copy.deepcopy(model)
    own = veneer.get_bank(twin)
    assert own.model is twin and own is not bank and torch.equal(logits(twin), live)
    own.activate("default")
    alone = logits(twin)
    assert not torch.equal(alone, live) and torch.equal(logits(model), live)
    own.activate("two")
    own.merge()
    torch.testing.assert_close(logits(copy.deepcopy(twin)), live, rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(twin)
    veneer.detach(again)
    assert torch.equal(logits(again), base)
    veneer.detach(twin)
    assert torch.equal(logits(twin), base) and "save_pretrained" not in twin.__dict__
    assert torch.equal(logits(model), live) and "save_pretrained" in model.__dict__
    bank.activate("default")
    assert torch.equal(logits(model), alone)
    with pytest.raises(AdapterStateError, match="copy the model"):
        copy.deepcopy(bank)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["model.encoder.embed_tokens"], "tied_head": "both"},
        {"target_modules": ["fc1"], "modules_to_save": ["lm_head"]},
    ],
    ids=["head", "both", "saved"],
)
def test_a_merged_model_whose_head_was_tied_to_three_embeddings_is_written_whole(options, tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=60, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=40,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    randomise(veneer.attach(model, veneer.AdapterConfig(rank=3, **options)))
    with torch.no_grad():
        adapted = model(input_ids=IDS, decoder_input_ids=IDS).logits
        veneer.merge(model).save_pretrained(tmp_path)
        again = BartForConditionalGeneration.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(input_ids=IDS, decoder_input_ids=IDS).logits, adapted, rtol=1e-4, atol=1e-5)


def test_merging_biases_that_the_architecture_has_no_place_for_warns():
    model = tiny_llama()
    randomise(veneer.attach(model, veneer.AdapterConfig(rank=2, lora_bias=True, target_modules=["q_proj", "v_proj"])))
    adapted = logits(model)
    with pytest.warns(UserWarning, match="4 merged layers, first model.layers.0.self_attn.q_proj, have a bias now"):
        veneer.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("body", [False, True], ids=["model", "body"])
def test_calls_with_other_invocations_keep_their_own_places_under_gradient_checkpointing(body):
    """Both calls come before the one backward pass, in which every block runs again."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny_llama()
        bank = veneer.attach(model, veneer.AdapterConfig(rank=3, invocation=[7, 8]), seed=0)
        randomise(bank)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        first, second = IDS[:1], torch.tensor([[8, 13, 21, 5, 34, 7, 8]])
        called = model.base_model if body else model
        outs = [called(input_ids=ids)[0] for ids in (first, second)]
        sum(out.square().sum() for out in outs).backward()
        gradients.append([p.grad for p in bank.parameters("default").values()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["lora", "dora"])
def test_gradient_checkpointing_replays_the_adapters_that_acted(options):
    """One backward pass over calls with one adapter, another, and a row each; then the present adapter acts again."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny_llama()
        for seed, name in enumerate("ab"):
            bank = veneer.attach(model, veneer.AdapterConfig(rank=3, **options), name=name, seed=seed)
            randomise(bank, name, spread=0.1)
        trained = [p for name in "ab" for p in bank.parameters(name).values()]
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        bank.activate("a")
        loss = logits(model).square().sum()
        bank.activate({"a": 0.5, "b": 1.0})
        loss = loss + logits(model).square().sum()
        with bank.route(["b", "a"]):
            loss = loss + logits(model).square().sum()
        bank.activate("b")
        loss.backward()
        assert bank.active == {"b": 1.0} and bank.routing.rows is None
        gradients.append([p.grad for p in trained])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
