"""accelerate against the same PEFT model left alone: logits, gradients, files, and every operation around it."""

import copy
import pickle

import peft
import pytest
import torch
from live import BIASED, IDS, config, randomise, run
from torch import nn

import veneer
from conftest import tiny_llama
from veneer.errors import AdapterStateError
from veneer.interop.accelerated import AcceleratedForward

pytestmark = pytest.mark.filterwarnings("ignore")


def peft_model(base=None, **options):
    return randomise(peft.get_peft_model(tiny_llama(**base or {}), config(**options)))


def pair(make):
    """The same model twice, the second accelerated."""
    plain, fast = make(), make()
    return plain, fast, veneer.accelerate(fast)


def assert_same(one, two, tolerance=1e-4):
    """Float32 sums in another order, on whatever processor, by default; in float64 ask for 1e-10."""
    torch.testing.assert_close(one[0], two[0], rtol=tolerance, atol=tolerance * float(one[0].abs().max()))
    assert one[1].keys() == two[1].keys() and one[1]
    for name, grad in one[1].items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(
            two[1][name], grad, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: n + m
        )


def fast_layers(model):
    return [m for m in model.modules() if isinstance(m, AcceleratedForward)]


CASES = {
    "plain": ({}, {}),
    "rslora": ({}, {"use_rslora": True}),
    "patterns": ({}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "dropout": ({}, {"lora_dropout": 0.4}),
    "bias-all": (BIASED, {"bias": "all"}),
    "head": ({}, {"target_modules": ["lm_head", "q_proj"]}),
    "saved-norm": ({}, {"modules_to_save": ["norm"]}),
    "lora-bias": (BIASED, {"lora_bias": True}),
    "dora": ({}, {"use_dora": True}),
    "dora-bias": (BIASED, {"use_dora": True, "use_rslora": True}),
    "dora-dropout": ({}, {"use_dora": True, "lora_dropout": 0.3}),
    "pissa": ({}, {"init_lora_weights": "pissa"}),
    "embedding": ({"tie_word_embeddings": False}, {"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_logits_gradients_and_state_dict_are_pefts(case, training):
    base, options = CASES[case]
    plain, fast, report = pair(lambda: peft_model(base, **options).train(training).double())
    assert len(report.accelerated) == len(fast_layers(fast))
    assert bool(report.accelerated) == (case != "lora-bias")
    assert_same(run(plain), run(fast), 1e-10)  # in float64: what float32 rounds away depends on the processor
    one, two = plain.state_dict(), fast.state_dict()
    assert list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_report_names_what_is_not_accelerated_and_why():
    model = peft_model({"tie_word_embeddings": False}, target_modules=["embed_tokens", "q_proj"])
    report = veneer.accelerate(model)
    assert [name.rsplit(".", 1)[-1] for name in report.accelerated] == ["q_proj", "q_proj"]
    assert report.plain == {"base_model.model.model.embed_tokens": "lora.Embedding is not covered"}
    assert str(report) == "2 of 3 PEFT layers accelerated; 1 not: lora.Embedding is not covered"
    alora = peft_model(alora_invocation_tokens=[5])
    assert "ALoraLinearVariant is not covered" in str(veneer.accelerate(alora))
    with pytest.raises(AdapterStateError, match="veneer.attach"):
        veneer.accelerate(tiny_llama())


def test_forward_saves_x_alone_but_honours_hooks_on_the_factors():
    model, calls, kept = peft_model(), [], []
    veneer.accelerate(model)
    layer, x = fast_layers(model)[0], torch.randn(3, 36, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        expected = layer(x)
    assert kept.count((3, 36)) == 1 and (3, 5) not in kept
    layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(x), expected)
    assert calls == [1]


def test_dora_follows_a_changed_base_weight():
    plain, fast, _ = pair(lambda: peft_model(use_dora=True).train())  # in eval PEFT keeps the norms it had
    assert_same(run(plain), run(fast))
    for model in (plain, fast):
        for layer in (m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)):
            with torch.no_grad():
                layer.base_layer.weight.mul_(1.5)
    assert_same(run(plain), run(fast))


def test_second_call_and_undo():
    model = peft_model()
    before, layers = run(model), list(model.modules())
    first = veneer.accelerate(model)
    assert veneer.accelerate(model) == first and len(fast_layers(model)) == 14
    assert all(one is two for one, two in zip(layers, model.modules()))
    assert veneer.decelerate(model) is model and not fast_layers(model)
    assert torch.equal(run(model)[0], before[0])


def test_conv1d():
    from transformers import GPT2Config, GPT2LMHeadModel

    def make():
        torch.manual_seed(0)
        size = {"n_layer": 2, "n_head": 2, "n_embd": 12, "vocab_size": 60, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
        options = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
        return randomise(peft.get_peft_model(model, config(**options)))

    plain, fast, report = pair(make)
    assert len(report.accelerated) == 8 and not report.plain
    assert_same(run(plain), run(fast))


def bitsandbytes_linear(old, bits):
    bnb = pytest.importorskip("bitsandbytes")
    if bits == 4:
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
    else:
        new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
    return new.to("cpu")


def hqq_linear(old):
    hqq = pytest.importorskip("hqq.core.quantize")
    options = {"compute_dtype": torch.float32, "device": "cpu"}
    return hqq.HQQLinear(old, hqq.BaseQuantizeConfig(nbits=4, group_size=16), **options)


def torchao_linear(old):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(old, torchao.Int8WeightOnlyConfig())
    return old


QUANTISED = {
    "nf4": lambda old: bitsandbytes_linear(old, 4),
    "int8": lambda old: bitsandbytes_linear(old, 8),
    "hqq": hqq_linear,
    "torchao": torchao_linear,
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_bases(kind):
    def make():
        model = tiny_llama(hidden_size=64, intermediate_size=128, num_attention_heads=4)
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, old in list(parent.named_children()):
                    if isinstance(old, nn.Linear):
                        setattr(parent, name, QUANTISED[kind](old))
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
        return randomise(
            peft.get_peft_model(model, config(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
        )

    plain, fast, report = pair(make)
    assert len(report.accelerated) == 8, report
    assert_same(run(plain), run(fast), 1e-4)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16-base", "autocast"])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=str)
def test_low_precision_is_as_near_the_truth_as_pefts(autocast, options):
    def make():
        model = peft_model(**options).train()
        if not autocast:
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()
        return model

    def measure(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return run(model)

    plain, fast, _ = pair(make)
    theirs, ours = measure(plain), measure(fast)
    truth = run(make().double())
    assert ours[0].dtype == theirs[0].dtype

    def errors(one):
        pairs = [(one[0], truth[0])] + [(grad, truth[1][name]) for name, grad in one[1].items()]
        every = torch.stack([(value - true).norm() / true.norm() for value, true in pairs])
        return float(every[0]), float(every.mean()), float(every.max())

    for mine, pefts in zip(errors(ours), errors(theirs)):
        assert mine < 1.5 * pefts < 0.3


def test_input_is_not_cast_to_the_adapters_dtype():
    def make():
        return peft_model().bfloat16()

    model = make()
    veneer.accelerate(model)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.shape[0])) or t, lambda t: t):
        fast_layers(model)[0](torch.randn(11, 36, dtype=torch.bfloat16, requires_grad=True))
    assert all(dtype == torch.bfloat16 for dtype, rows in kept if rows == 11)


def test_adapters_are_added_switched_disabled_merged_and_deleted_as_in_peft():
    def make():
        return peft_model(target_modules=["q_proj", "down_proj"]).eval()

    plain, fast, _ = pair(make)

    def both(action, tolerance=1e-4):
        for model in (plain, fast):
            torch.manual_seed(3)
            action(model)
        assert_same_logits(tolerance)

    def assert_same_logits(tolerance, **options):
        one, two = plain(input_ids=IDS, **options).logits, fast(input_ids=IDS, **options).logits
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)

    def add(model):
        model.add_adapter("second", config(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        model.set_adapter("second")

    both(add)
    assert len(fast_layers(fast)) == 4  # up_proj had no adapter before: plain until the next call
    veneer.accelerate(fast)
    assert len(fast_layers(fast)) == 6
    assert_same_logits(1e-4)
    assert [p.requires_grad for p in plain.parameters()] == [p.requires_grad for p in fast.parameters()]
    both(lambda model: model.base_model.set_adapter(["default", "second"]))
    assert_same_logits(1e-4, adapter_names=["default", "__base__"])
    with plain.disable_adapter(), fast.disable_adapter():
        assert_same_logits(1e-4)
        assert torch.allclose(fast(input_ids=IDS).logits, tiny_llama()(IDS).logits, atol=1e-5)
    both(lambda model: model.merge_adapter())
    both(lambda model: model.unmerge_adapter())
    both(lambda model: model.set_adapter("default"))
    both(lambda model: model.delete_adapter("second"))
    one, two = plain.merge_and_unload(), fast.merge_and_unload()
    assert not fast_layers(two) and type(two) is type(one)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_gradient_checkpointing():
    def make():
        model = peft_model().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    plain, fast, _ = pair(make)
    assert_same(run(plain), run(fast))
    assert_same(run(peft_model()), run(fast))


def test_saved_files_are_byte_equal_and_load_in_both(tmp_path):
    plain, fast, _ = pair(peft_model)
    plain.save_pretrained(tmp_path / "plain")
    fast.save_pretrained(tmp_path / "fast")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()
    expected = fast(input_ids=IDS).logits
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "fast")
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    ours = tiny_llama()
    veneer.load_adapter(ours, tmp_path / "fast")
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_stay_accelerated():
    model = peft_model()
    veneer.accelerate(model)
    expected = run(model)
    twin = copy.deepcopy(model)
    assert len(fast_layers(twin)) == 14 and not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert_same(run(twin), expected)
    layer = pickle.loads(pickle.dumps(fast_layers(model)[0]))
    assert type(layer) is type(fast_layers(model)[0])


def test_compiles_without_a_break():
    model = peft_model()
    veneer.accelerate(model)
    layer, x = fast_layers(model)[0], torch.randn(2, 7, 36, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    (one,), (two,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, layer))
    torch.testing.assert_close(one, two)


def test_transformers_own_adapters():
    def make():
        model = tiny_llama()
        model.add_adapter(config(task_type=None))
        return randomise(model)

    plain, fast, report = pair(make)
    assert len(report.accelerated) == 14
    assert_same(run(plain), run(fast))
