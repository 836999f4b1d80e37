"""Adapters trained together end where each ends alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import veneer
from conftest import tiny_llama
from veneer.adapter.attach import detach
from veneer.config import TrainConfig
from veneer.data.example import TokenizedExample
from veneer.data.prepare import Counts
from veneer.training import many
from veneer.training.loop import Trainer
from veneer.training.metrics import read_metrics
from veneer.training.setup import Setup


class Fake:
    """A tokenizer for notes and provenance; the tests' data are token ids."""

    chat_template = None

    def decode(self, ids):
        return str(ids)


def examples(seed: int, count: int = 7, shared: int = 12):
    rng = np.random.default_rng(seed)
    start = rng.integers(1, 400, shared)
    found = []
    for _ in range(count):
        own = rng.integers(1, 400, rng.integers(4, 20))
        mask = np.zeros(shared + len(own), bool)
        mask[shared + len(own) // 2 :] = True
        found.append(TokenizedExample(np.concatenate([start, own]).astype(np.int32), mask))
    return found


def setup(model, data, heldout=None):
    base = {"name_or_path": "tiny", "quant": None, "fingerprint": veneer.base.fingerprint.fingerprint(model).as_dict()}
    return Setup(model, Fake(), data, heldout, "key", {"train": Counts()}, base)


def config(out, data="x", **values):
    train = {"batch_size": 3, "lr": 5e-3, "epochs": 1, "micro_batch_tokens": 64} | values.pop("train", {})
    return TrainConfig(data=data, out=str(out), adapter={"rank": 4} | values.pop("adapter", {}), train=train, **values)


def alone(model, configs, data, heldout=None):
    """Each configuration through `Trainer`, one after another."""
    found = []
    for i, c in enumerate(configs):
        c = c.model_copy(update={"out": f"{c.out}-alone"})
        Trainer(c, setup=setup(model, data[i], heldout)).run()
        detach(model)
        found.append(c)
    return found


def together(model, configs, data, heldout=None, tokens=None, spoil=None):
    """All through one pool; the lanes by their end."""
    lanes = [
        many.Lane(c, f"lane{i}", setup(model, data[i], heldout), lambda record: None) for i, c in enumerate(configs)
    ]
    with many.Pool(model, tokens=tokens, note=print) as pool:
        for lane in lanes:
            assert pool.add(lane, resume=False) is None
        while pool.lanes:
            if spoil:
                spoil(pool)
            pool.tick()
    detach(model)
    return lanes


def spoil(pool):
    """A NaN in the second adapter's factors before its second step."""
    for lane in pool.lanes:
        if lane.name == "lane1" and lane.state.step == 1:
            next(iter(lane.parameters.values())).data[0, 0] = float("nan")


def weights(out):
    return load_file(f"{out}/adapter/adapter_model.safetensors")


def assert_same(out, other, tolerance):
    mine, theirs = weights(out), weights(other)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(mine[key], value, rtol=0, atol=tolerance * max(scale, 1e-3), msg=key)


ADAPTERS = st.fixed_dictionaries(
    {
        "rank": st.sampled_from([1, 2, 4, 8]),
        "alpha": st.sampled_from([3.0, 8.0, 16.0]),
        "target_modules": st.sampled_from(
            ["all-linear", "attention", "mlp", ["q_proj", "v_proj"], ["down_proj"], ["embed_tokens", "o_proj"]]
        ),
        "dropout": st.sampled_from([0.0, 0.0, 0.2]),
        "rslora": st.booleans(),
    },
    optional={
        "dora": st.just(True),
        "init": st.sampled_from(["gaussian", "orthogonal"]),
        "layers": st.sampled_from([[1], [0, 1]]),
    },
)
TRAIN = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 5e-3, 2e-2]),
        "batch_size": st.sampled_from([2, 3, 5]),
        "epochs": st.sampled_from([1, 1.5]),
        "schedule": st.sampled_from(["cosine", "linear", "constant"]),
        "warmup": st.sampled_from([0, 2]),
        "max_grad_norm": st.sampled_from([0.1, 1.0]),
        "lora_plus_ratio": st.sampled_from([1.0, 4.0]),
        "micro_batch_tokens": st.sampled_from([32, 64, 512]),
        "share_prefix": st.booleans(),
    }
)


def allowed(adapter):
    embeds = "embed_tokens" in adapter["target_modules"]
    if embeds:
        adapter = {k: v for k, v in adapter.items() if k not in ("layers", "init")} | {"tied_head": "embedding"}
    if adapter.get("init") == "orthogonal" and adapter["rank"] % 2:
        adapter = adapter | {"rank": 2}
    return adapter


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(ADAPTERS, TRAIN, st.integers(0, 2), st.integers(0, 9)), min_size=2, max_size=4), st.booleans()
)
def test_any_mix_of_adapters_ends_where_each_ends_alone(tmp_path_factory, mix, split):
    """Float64: what is left is rounding. Ranks, targets, rates, schedules, data, seeds and variants at random."""
    folder, model = tmp_path_factory.mktemp("mix"), tiny_llama().double()
    configs = [
        config(folder / f"{i}", adapter=allowed(a), train=t, seed=seed, dtype="auto")
        for i, (a, t, _, seed) in enumerate(mix)
    ]
    data = [examples(which) for _, _, which, _ in mix]
    expected = alone(model, configs, data)
    lanes = together(model, configs, data, tokens=70 if split else 4096)
    for lane, c, one in zip(lanes, configs, expected):
        assert lane.status == "finished"
        assert_same(c.out, one.out, 1e-4 if lane.config.adapter.dtype == "float32" else 1e-9)
        mine, theirs = ([r for r in read_metrics(x.out) if r["type"] == "train"] for x in (c, one))
        for key in ("step", "lr", "loss", "grad_norm", "tokens", "computed_tokens", "supervised_tokens", "epoch"):
            assert [r[key] for r in mine] == pytest.approx([r[key] for r in theirs], rel=1e-5), key


def test_variants_train_together_as_alone(tmp_path):
    """AdaLoRA, LoRA-FA, PiSSA, DoRA with dropout and a trained bias of their own, in one pass."""
    model = tiny_llama().double()
    adapters = [
        {"rank": 6, "adalora": {"target_rank": 3, "tinit": 2, "tfinal": 2}},
        {"lora_fa": True},
        {"init": "pissa"},
        {"dora": True, "dropout": 0.3},
        {"lora_bias": True, "target_modules": "mlp"},
        {"init": "eva", "target_modules": "attention"},  # computed while others train
    ]
    configs = [config(tmp_path / f"{i}", adapter=a, train={"epochs": 3}) for i, a in enumerate(adapters)]
    for c in configs:
        c.adapter.init_options.examples = 3
    data = [examples(i % 2, 9) for i in range(len(configs))]
    expected = alone(model, configs, data)
    for lane, one in zip(together(model, configs, data, tokens=4096), expected):
        assert lane.status == "finished"
        assert_same(lane.config.out, one.out, 1e-4)


def test_equal_rows_go_through_the_blocks_below_the_first_adapted_one_once(tmp_path, monkeypatch):
    model, seen = tiny_llama(num_hidden_layers=4).double(), {n: [] for n in range(4)}
    adapter = {"layers": [2, 3]}
    configs = [
        config(tmp_path / "a", adapter=adapter | {"rank": 2}),
        config(tmp_path / "b", adapter=adapter, train={"lr": 1e-3}),
        config(tmp_path / "c", adapter={"layers": [3]}),
        config(tmp_path / "d", adapter=adapter, seed=5),  # another order of the same data
    ]
    data = [examples(0)] * 4
    expected = alone(model, configs, data)
    for n, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(
            lambda m, args, n=n: seen[n].append(args[0].shape[1]) if m.training else None
        )
    lanes = together(model, configs, data, tokens=4096)
    for lane, one in zip(lanes, expected):
        assert_same(lane.config.out, one.out, 1e-4)
    assert seen[0] == seen[1] and seen[2] == seen[3] and len(seen[0]) > 1
    for below, above in zip(seen[0], seen[2]):
        assert 1.6 <= above / below <= 2.5  # of four copies, three are equal


def test_passes_take_one_row_of_each_and_no_more_tokens_than_allowed():
    class Sized:
        def __init__(self, size):
            self.input_ids = np.zeros(size)

    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = [[Sized(int(rng.integers(1, 50))) for _ in range(rng.integers(0, 4))] for _ in range(5)]
        found = many.passes(rows, 60)
        assert sum(len(p) for p in found) == sum(map(len, rows))
        for one in found:
            sizes = [len(row.input_ids) for _, row in one]
            assert sum(sizes) <= 60 or len(sizes) == 1
            assert [i for i, _ in one] == sorted({i for i, _ in one})
        for i, mine in enumerate(rows):
            assert [row for one in found for j, row in one if j == i] == mine


def test_a_pass_too_large_for_memory_is_split_and_nothing_changes(tmp_path, monkeypatch):
    model, real, sizes, notes = tiny_llama().double(), many.Pool._pass, [], []

    def small(self, rows, lanes):
        size = sum(len(row.input_ids) for _, row in rows)
        if size > 150 and len(rows) > 1:
            raise torch.OutOfMemoryError("no room")
        sizes.append(size)
        return real(self, rows, lanes)

    configs = [config(tmp_path / f"{i}", seed=i, train={"micro_batch_tokens": 512}) for i in range(4)]
    data = [examples(0)] * 4
    expected = alone(model, configs, data)
    monkeypatch.setattr(many.Pool, "_pass", small)
    monkeypatch.setattr("builtins.print", lambda text: notes.append(text))
    lanes = together(model, configs, data, tokens=4096)
    for lane, one in zip(lanes, expected):
        assert_same(lane.config.out, one.out, 1e-4)
    assert max(sizes) <= 150 and any("did not fit into memory" in note for note in notes)


@pytest.mark.parametrize("way", ["loop", "stacked"])
def test_a_nan_neighbour_changes_nothing_for_the_others(way, tmp_path, monkeypatch):
    """On a GPU products are stacked, where a NaN would spread: then the step is done again, one by one."""
    if way == "stacked":
        from veneer.kernels import ranges

        def stacked(x, weight, bias, lora_A, lora_B, scaling, names, where):
            mask = where.mask(names, [a.shape[0] for a in lora_A])
            factors = [f for pair in zip(lora_A, lora_B) for f in pair]
            return ranges.StackedLora.apply(x, weight, bias, mask, tuple(scaling), *factors)

        monkeypatch.setattr(ranges, "ranged_lora_linear", stacked)
    model = tiny_llama().double()
    configs = [config(tmp_path / f"{i}", seed=i, adapter={"dropout": 0.1}) for i in range(3)]
    data = [examples(i) for i in range(3)]
    expected = alone(model, configs, data)

    lanes = together(model, configs, data, tokens=4096, spoil=spoil)
    assert [lane.status for lane in lanes] == ["finished", "diverged", "finished"]
    assert "step 2" in lanes[1].reason and (tmp_path / "1" / "bad_batch.json").exists()
    for n in (0, 2):
        assert_same(configs[n].out, expected[n].out, 1e-4)


def test_early_stopping_is_each_ones_own(tmp_path):
    model, data = tiny_llama().double(), examples(0)
    stop = {"eval_every": 1, "early_stop": 2, "epochs": 8, "schedule": "constant"}
    configs = [config(tmp_path / "a", train=stop | {"lr": 0.5}), config(tmp_path / "b", train=stop | {"lr": 1e-4})]
    expected = alone(model, configs, [data] * 2, heldout=examples(3))
    lanes = together(model, configs, [data] * 2, heldout=examples(3))
    assert lanes[0].status == "early" and lanes[0].state.step < lanes[1].state.step
    for lane, one in zip(lanes, expected):
        assert_same(lane.config.out, one.out, 1e-4)
        evals = [[r["loss"] for r in read_metrics(o) if r["type"] == "eval"] for o in (lane.config.out, one.out)]
        assert evals[0] == pytest.approx(evals[1], rel=1e-5)


def test_checkpointed_blocks_give_the_same(tmp_path):
    model, data = tiny_llama(num_hidden_layers=3).double(), [examples(0)] * 2
    adapter = {"layers": [1, 2]}
    configs = [
        config(tmp_path / f"{i}", adapter=adapter, train={"checkpointing": True, "lr": lr})
        for i, lr in enumerate((1e-3, 5e-3))
    ]
    expected = alone(model, configs, data)
    for lane, one in zip(together(model, configs, data, tokens=4096), expected):
        assert_same(lane.config.out, one.out, 1e-4)
    reason = many.lone_reason(config("x", adapter={"dropout": 0.1}, train={"checkpointing": True}), torch.device("cpu"))
    assert "dropout" in reason


def test_a_base_that_cannot_be_packed_trains_its_adapters_one_by_one(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    values = dict(
        vocab_size=420, hidden_size=36, intermediate_size=52, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, head_dim=6, attn_logit_softcapping=5.0, _attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(Gemma2Config(**values)).eval().requires_grad_(False)
    lane = many.Lane(config(tmp_path / "a"), "lane0", setup(model, examples(0)), lambda record: None)
    with many.Pool(model, note=print) as pool:
        assert "packing is off" in pool.add(lane, resume=False)
        again = many.Lane(config(tmp_path / "a"), "lane0", setup(model, examples(0)), lambda r: None, alone=True)
        assert pool.add(again, resume=True) is None
        while pool.lanes:
            pool.tick()
    assert again.status == "finished" and (tmp_path / "a" / "adapter").exists()
