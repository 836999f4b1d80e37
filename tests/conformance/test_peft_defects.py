"""Known defects of PEFT, each with a test of the right behaviour. The docstrings say what PEFT does (0.21.2 measured).

Numbers are issues of huggingface/peft. Where no number stands, the defect was found by the conformance table.
"""

from __future__ import annotations

import sys

import pytest
import torch
from conformance.compare import load_in_peft, relative
from conformance.models import ARCHITECTURES
from conformance.toys import TOY, Toy, transformers_conv1d
from torch import nn

import veneer
from veneer.errors import AdapterStateError, TargetError

ARCHITECTURE = {a.name: a for a in ARCHITECTURES}
LLAMA = ARCHITECTURE["Llama"]


def attach(model, name="default", seed=0, **options):
    """A trained-looking adapter on `model`."""
    values = {"rank": 4, "alpha": 6, "target_modules": ["q_proj", "v_proj"]} | options
    bank = veneer.attach(model, veneer.AdapterConfig(**values), name=name, seed=seed)
    generator = torch.Generator().manual_seed(seed + 50)
    with torch.no_grad():
        for parameter in bank.parameters(name).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return bank


def logits(model, architecture=LLAMA):
    model.eval()
    with torch.no_grad():
        return model(**architecture.batch()).logits


# ---- targets and patterns that match nothing -------------------------------------------------------------------------


def test_3554_a_target_that_matches_nothing_is_an_error_even_if_others_match():
    """#3554, #1959, #3693: PEFT skips "in_proj" silently as long as any other entry matches; on a hybrid model that
    left 93 % of the layers frozen. Veneer names the entry and the near misses, and changes nothing."""
    model = LLAMA.model()
    with pytest.raises(TargetError, match="'in_proj' matches nothing"):
        attach(model, target_modules=["q_proj", "in_proj"])
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "veneer_bank")


def test_3554_the_default_covers_hybrid_models():
    """#3554: PEFT's default for an architecture is a list of attention names, so layers of another kind stay frozen.
    Veneer's default is every linear, whatever its name, and the report says what is trained."""

    class Hybrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.in_proj, self.dt_proj = (nn.Linear(10, 10) for _ in range(3))

    model = Hybrid()
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2))
    assert {t["name"] for t in bank.report().targets} == {"q_proj", "in_proj", "dt_proj"}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", ["k_proj", "base_model.model.model.layers.0.self_attn.q_proj", "q_pro"])
def test_3582_a_pattern_key_that_matches_nothing_is_an_error(field, key):
    """#3582: PEFT before 0.21 ignores the key silently, so that a module trains with another rank or alpha than asked;
    0.21 warns. Veneer raises."""
    with pytest.raises(TargetError, match=f"{field} key .* matches no adapted module"):
        attach(LLAMA.model(), **{field: {key: 2}})


@pytest.mark.parametrize(
    "key, hits",
    [
        ("^model.layers.0.self_attn.q_proj", ["model.layers.0.self_attn.q_proj"]),
        ("model.layers.1.self_attn.v_proj", ["model.layers.1.self_attn.v_proj"]),
        (r"layers\.[01]\.self_attn\.q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("q_proj$", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
    ],
)
def test_3582_anchored_and_whole_names_work(key, hits):
    """#3582: PEFT wraps the key as (.*\\.)?(key)$, so its own documented '^q_proj' can never match."""
    bank = attach(LLAMA.model(), rank_pattern={key: 2})
    assert [name for name, layer in bank.layers.items() if layer.rank["default"] == 2] == hits


def test_the_first_matching_pattern_still_wins_after_loading(tmp_path):
    """PEFT takes the first pattern that matches but sorts the keys when it writes adapter_config.json: an adapter
    with overlapping patterns comes back with other scalings or fails to load. Veneer's survives the file, in PEFT too."""
    patterns = {"v_proj": 5, "self_attn.v_proj": 9, ".*[vq]_proj": 11}
    model = LLAMA.model()
    bank = attach(model, rank_pattern=dict.fromkeys(patterns, 3) | {"v_proj": 2}, alpha_pattern=patterns)
    path = veneer.save_adapter(model, tmp_path / "adapter")
    again = LLAMA.model()
    loaded = veneer.load_adapter(again, path)
    for name, layer in bank.layers.items():
        assert layer.scaling["default"] == (5 / 2 if "v_proj" in name else 11 / 3)
        assert loaded.layers[name].scaling == layer.scaling
    assert torch.equal(logits(again), logits(model))
    pytest.importorskip("peft")
    assert relative(logits(load_in_peft(LLAMA, path)), logits(model)) < 1e-5


# ---- swapping and merging --------------------------------------------------------------------------------------------


def test_3581_swapping_under_a_merge_is_never_a_silent_no_op():
    """#3581, case 1: hotswap_adapter on a merged model leaves the old adapter acting, and unmerging then subtracts the
    new one from the old (PEFT 0.21 refuses). In Veneer either the swap acts or it is refused, and unmerging restores."""
    model = LLAMA.model()
    bank = attach(model, "one")
    first = logits(model)
    attach(model, "two", seed=1)
    second = logits(model)
    bank.activate("one")
    bank.merge()
    try:
        bank.activate("two")
    except AdapterStateError:
        bank.unmerge()
        bank.activate("two")
    assert relative(logits(model), second) < 1e-5
    bank.activate("one")
    assert relative(logits(model), first) < 1e-5
    veneer.detach(model)
    assert torch.equal(logits(model), logits(LLAMA.model()))


def test_3581_an_adapter_with_whole_modules_swaps_in():
    """#3581, case 2: hotswap_adapter dies with a KeyError on a checkpoint that holds modules_to_save, still in 0.21."""
    model = LLAMA.model()
    bank = attach(model, "one")
    first = logits(model)
    attach(model, "two", seed=1, modules_to_save=["lm_head"])
    second = logits(model)
    for name, expected in (("one", first), ("two", second), ("one", first)):
        bank.activate(name)
        assert torch.equal(logits(model), expected)


def test_3581_a_swapped_adapter_saves_with_its_own_rank_and_alpha(tmp_path):
    """#3581, case 3: after hotswapping to another rank or alpha PEFT saves the old config, and the file no longer
    loads, still in 0.21. In Veneer rank and alpha belong to the adapter."""
    model = LLAMA.model()
    bank = attach(model, "one")
    attach(model, "two", seed=1, rank=6, alpha=21, rslora=True)
    expected = logits(model)
    bank.activate("one")
    bank.activate("two")
    path = veneer.save_adapter(model, tmp_path / "two", name="two")
    again = LLAMA.model()
    loaded = veneer.load_adapter(again, path)
    assert {layer.rank["default"] for layer in loaded.layers.values()} == {6}
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unmerging_restores_every_bit(dtype):
    """PEFT unmerges by subtracting ΔW in the base's dtype; in bfloat16 that leaves the base changed."""
    model = LLAMA.model().to(dtype)
    bank = attach(model, target_modules="all-linear")
    before = {name: layer.weight.clone() for name, layer in bank.layers.items()}
    for _ in range(3):
        bank.merge()
        bank.unmerge()
    assert all(torch.equal(layer.weight, before[name]) for name, layer in bank.layers.items())


def test_981_a_further_adapter_takes_no_more_work_than_the_first(tmp_path):
    """#981: in PEFT each further adapter loads more slowly, as every load walks over all adapters that are there.
    Counted in function calls, the twelfth costs Veneer what the second did."""
    model = LLAMA.model()
    attach(model)
    path = veneer.save_adapter(model, tmp_path / "adapter")

    def calls(name):
        count = 0

        def tick(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(tick)
        try:
            veneer.load_adapter(model, path, name=name)
        finally:
            sys.setprofile(None)
        return count

    work = [calls(f"adapter-{n}") for n in range(14)]
    assert work[-1] < 1.05 * work[1], work


def test_two_adapters_may_both_train_biases(tmp_path):
    """PEFT changes the base's own biases in place: it refuses a second adapter with biases, and its disabled adapter is
    not the base. In Veneer each adapter brings its own."""
    toy = Toy(lin0=nn.Linear(10, 7), lin1=nn.Linear(7, 6))
    x = torch.randn(3, 10)
    base = toy(x).logits
    bank = attach(toy, "one", target_modules=["lin0"], bias="all", rank=2)
    one = toy(x).logits
    attach(toy, "two", seed=1, target_modules=["lin0"], bias="lora_only", rank=2)
    two = toy(x).logits
    for name, expected in (("one", one), ("two", two)):
        bank.activate(name)
        assert torch.equal(toy(x).logits, expected)
    with bank.disabled():
        assert torch.equal(toy(x).logits, base)


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"dilation": (1, 2)},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "reflect"},
        {"stride": 2},
    ],
    ids=str,
)
def test_a_convolution_adapter_is_a_change_of_the_kernel(options):
    """PEFT's LoRA convolution drops dilation (a crash) and padding_mode (live and merged answers differ). Veneer's
    answers as the convolution with the kernel W + s·B·A."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 9, 3, **options)
    model = Toy(conv=conv)
    bank = attach(model, target_modules=["conv"], rank=3)
    x = torch.randn(2, 6, 7, 9)
    layer = bank.layers["conv"]
    kernel = conv.weight.double() + layer.delta("default").double().view_as(conv.weight)
    twin = nn.Conv2d(6, 9, 3, **options).double()
    with torch.no_grad():
        twin.weight.copy_(kernel)
        twin.bias.copy_(conv.bias)
    expected = torch.tanh(twin(x.double())).flatten(1)
    assert relative(model(x).logits, expected) < 1e-5
    bank.merge()
    assert relative(model(x).logits, expected) < 1e-5


def test_attention_answers_as_pefts_and_its_gradient_is_the_losss_derivative(tmp_path):
    """PEFT adds ΔW of a MultiheadAttention's out_proj twice in the forward pass and once in the backward pass, so its
    gradient is half the derivative of its own loss. A file means 2·ΔW there; Veneer answers the same and trains with the
    true gradient."""
    pytest.importorskip("peft")
    from conformance import compare

    toy = TOY["MultiheadAttention"]
    theirs = compare.make_peft(toy, {})
    compare.randomise(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    mine = toy.model()
    bank = veneer.load_adapter(mine, tmp_path / "peft")
    scores, loss = compare.answer(mine, toy.batch(), backward=True)
    assert relative(scores, compare.answer(theirs, toy.batch())[0]) < 1e-5
    for key, parameter in bank.parameters("default").items():
        step = parameter.grad / parameter.grad.norm() * 1e-2
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter.add_(sign * step)
            losses.append(compare.answer(mine, toy.batch())[1].item())
        with torch.no_grad():
            parameter.add_(step)
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(parameter.grad.norm().item(), rel=0.05), key


# ---- weights that two modules share ----------------------------------------------------------------------------------

TIED = ["Gemma 2", "GPT-2", "OPT", "BLOOM"]


def reloaded(model, path):
    """The model after saving and loading it as transformers does."""
    model.save_pretrained(path)
    return type(model).from_pretrained(path)


@pytest.mark.parametrize("name", TIED)
def test_2018_an_adapter_on_a_tied_head_leaves_the_embedding_alone(name, tmp_path):
    """#2018: PEFT merges an adapter on lm_head into the tensor that the embedding shares, so the merged model answers
    differently from the adapter. Veneer's merged head gets its own weight, and the model is saved as untied."""
    architecture = ARCHITECTURE[name]
    model = architecture.model()
    embedding = model.get_input_embeddings().weight.clone()
    attach(model, target_modules=["lm_head"])
    live = logits(model, architecture)
    veneer.merge(model)
    assert relative(logits(model, architecture), live) < 1e-5
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert relative(logits(reloaded(model, tmp_path / "merged"), architecture), live) < 1e-5


@pytest.mark.parametrize("name", TIED)
def test_2777_an_adapter_on_a_tied_embedding_is_a_choice(name):
    """#2777, #2018: PEFT adapts the input use of a tied embedding only and says nothing. Veneer asks."""
    architecture = ARCHITECTURE[name]
    with pytest.raises(TargetError, match="tied_head: both"):
        attach(architecture.model(), target_modules=[architecture.embedding])


@pytest.mark.parametrize("choice", ["both", "embedding"])
@pytest.mark.parametrize("name", TIED)
def test_2777_merged_and_saved_a_tied_model_keeps_its_adapter(name, choice, tmp_path):
    """#2777: PEFT merges into the shared tensor but for one use only, keeps tie_word_embeddings = True, and the saved
    model answers nonsense. Veneer's merged model answers as the adapter did, before and after saving."""
    architecture = ARCHITECTURE[name]
    model = architecture.model()
    base = logits(model, architecture)
    bank = attach(model, target_modules=[architecture.embedding], tied_head=choice)
    live = logits(model, architecture)
    assert relative(live, base) > 1e-3
    # The definition: the embedding is E + ΔE, and the head shares it or keeps E.
    twin = architecture.model()
    embedding = twin.get_input_embeddings()
    changed = embedding.weight.detach() + next(iter(bank.layers.values())).delta("default")
    head = embedding.weight.detach().clone() if choice == "embedding" else changed
    embedding.weight = nn.Parameter(changed)
    twin.get_output_embeddings().weight = nn.Parameter(head)
    assert relative(live, logits(twin, architecture)) < 1e-5
    veneer.merge(model)
    assert relative(logits(model, architecture), live) < 1e-5
    assert model.config.tie_word_embeddings == (choice == "both")
    assert relative(logits(reloaded(model, tmp_path / "merged"), architecture), live) < 1e-5


@pytest.mark.parametrize("name", TIED)
def test_2777_whole_tied_modules_survive_merging_and_saving(name, tmp_path):
    """#2777: with both tied modules in modules_to_save, PEFT trains two copies, leaves tie_word_embeddings = True, and
    loading the merged model drops one of the two."""
    architecture = ARCHITECTURE[name]
    with pytest.raises(TargetError, match="tied"):
        attach(architecture.model(), target_modules="all-linear", modules_to_save=[architecture.embedding])
    model = architecture.model()
    attach(model, target_modules="all-linear", modules_to_save=[architecture.embedding, "lm_head"])
    live = logits(model, architecture)
    path = veneer.save_adapter(model, tmp_path / "adapter")
    again = architecture.model()
    veneer.load_adapter(again, path)
    assert torch.equal(logits(again, architecture), live)
    veneer.merge(model)
    assert relative(logits(model, architecture), live) < 1e-5
    assert relative(logits(reloaded(model, tmp_path / "merged"), architecture), live) < 1e-5


@pytest.mark.parametrize("name", ["T5", "BART"])
def test_an_adapter_on_an_embedding_that_is_never_called_is_refused(name):
    """T5's and BART's "shared" only lends its weight to the encoder's and decoder's own embeddings: PEFT adapts it, and
    nothing sees the adapter."""
    architecture = ARCHITECTURE[name]
    with pytest.raises(TargetError, match="encoder.embed_tokens"):
        attach(architecture.model(), target_modules=["shared"], tied_head="embedding")
    model = architecture.model()
    base = logits(model, architecture)
    attach(model, target_modules=["embed_tokens"], tied_head="embedding")
    assert relative(logits(model, architecture), base) > 1e-3


@pytest.mark.parametrize("name", [*TIED, "T5", "BART"])
def test_2018_trained_tokens_act_in_a_tied_head_too(name, tmp_path):
    """PEFT ties the rows; Veneer too, and merged and saved the model answers the same."""
    architecture = ARCHITECTURE[name]
    model = architecture.model()
    attach(model, target_modules="all-linear", trainable_tokens=[9, 5])
    live = logits(model, architecture)
    veneer.merge(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert relative(logits(model, architecture), live) < 1e-5
    assert relative(logits(reloaded(model, tmp_path / "merged"), architecture), live) < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_move_the_base_keep_whole_modules_and_patterns(init, tmp_path):
    """PEFT's conversion of a PiSSA or OLoRA adapter to a plain one loses the tensors of modules_to_save, and raises for
    rsLoRA with patterns. Veneer's file holds both, and works on the original base in Veneer and in PEFT."""
    options = {"rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"1.self_attn.q_proj": 9}}
    model = LLAMA.model()
    attach(model, init=init, modules_to_save=["lm_head"], **options)
    path = veneer.save_adapter(model, tmp_path / "adapter")
    again = LLAMA.model()
    veneer.load_adapter(again, path)
    assert relative(logits(again), logits(model)) < 1e-4
    pytest.importorskip("peft")
    assert relative(logits(load_in_peft(LLAMA, path)), logits(model)) < 1e-4


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_move_the_base_work_on_transposed_weights(init, tmp_path):
    """PEFT's OLoRA takes the QR of a Conv1D's weight untransposed and cannot load what it saves."""
    torch.manual_seed(0)
    make = lambda: Toy(conv=transformers_conv1d(7, 10))  # noqa: E731
    model = make()
    state = model.state_dict()
    x = torch.randn(3, 10)
    base = model(x).logits
    bank = veneer.attach(model, veneer.AdapterConfig(rank=3, target_modules=["conv"], init=init), seed=0)
    assert relative(model(x).logits, base) < 1e-5
    with torch.no_grad():
        for parameter in bank.parameters("default").values():
            parameter.add_(0.1)
    again = make()
    again.load_state_dict(state)
    veneer.load_adapter(again, veneer.save_adapter(model, tmp_path / "adapter"))
    assert relative(again(x).logits, model(x).logits) < 1e-5
    assert relative(again(x).logits, base) > 1e-3
