"""Adapters trained together end where each ends alone."""

from __future__ import annotations

import dataclasses

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
from veneer.errors import AdapterStateError
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
