"""AdaLoRA: each function against its formula, and whole runs against PEFT's AdaLoraModel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import veneer
from conftest import tiny_llama
from veneer.config import AdaLoraConfig
from veneer.errors import ConfigError, RunError
from veneer.training import adalora
from veneer.training.adalora import AdaLora, budget_at, keep_best, phases

schedules = st.tuples(
    st.integers(0, 20), st.integers(0, 20), st.integers(1, 40), st.integers(1, 50), st.integers(1, 50)
)


@given(schedules)
def test_the_budget_falls_cubically_from_the_first_to_the_last(drawn):
    tinit, tfinal, between, target, more = drawn
    total, initial = tinit + tfinal + between, target + more
    budgets = [budget_at(t, total, tinit, tfinal, initial, target) for t in range(1, total + 1)]
    assert all(b == initial for b in budgets[:tinit])
    assert all(b == target for b in budgets[total - tfinal - 1 :])
    assert all(a >= b >= target for a, b in zip(budgets, budgets[1:]))
    for t in range(tinit + 1, total - tfinal + 1):
        exact = target + (initial - target) * (1 - (t - tinit) / between) ** 3
        assert math.floor(exact + 1e-9) == budgets[t - 1] or abs(exact - round(exact)) < 1e-9


@settings(deadline=None)  # the first call imports PEFT
@given(schedules, st.integers(1, 7))
def test_the_schedule_is_pefts(drawn, every):
    peft = pytest.importorskip("peft")
    from peft.tuners.adalora.layer import RankAllocator

    tinit, tfinal, between, target, more = drawn
    total = tinit + tfinal + between
    config = peft.AdaLoraConfig(
        target_r=target, init_r=target + more, tinit=tinit, tfinal=tfinal, deltaT=every, total_step=total
    )
    allocator = RankAllocator(torch.nn.Module(), config, "default")
    allocator.init_bgt, allocator.target_bgt = target + more, target
    for step in range(1, total + 1):
        assert budget_at(step, total, tinit, tfinal, target + more, target) == allocator.budget_schedule(step)[0]


def test_phases_are_steps_or_shares_and_need_a_step_between():
    assert phases(AdaLoraConfig(tinit=3, tfinal=5), 9) == (3, 5)
    assert phases(AdaLoraConfig(tinit=0.1, tfinal=0.5), 20) == (2, 10)
    assert phases(AdaLoraConfig(tinit=0, tfinal=0), 1) == (0, 0)
    with pytest.raises(ConfigError, match="leave none of the run's 8"):
        phases(AdaLoraConfig(tinit=3, tfinal=5), 8)


def test_importance_is_smoothed_sensitivity_and_its_uncertainty():
    torch.manual_seed(0)
    weights, grads = torch.randn(5, 3, 4).double(), torch.randn(5, 3, 4).double()
    sensitivity, uncertainty = torch.zeros(3, 4), torch.zeros(3, 4)
    i_bar, u_bar = torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for w, g in zip(weights, grads):
        adalora.smooth_(sensitivity, uncertainty, w.float(), g.float(), 0.8, 0.7)
        now = (w * g).abs()
        i_bar = 0.8 * i_bar + 0.2 * now
        u_bar = 0.7 * u_bar + 0.3 * (now - i_bar).abs()
    torch.testing.assert_close(sensitivity.double(), i_bar, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(uncertainty.double(), u_bar, rtol=1e-5, atol=1e-7)


def test_a_triplet_scores_its_value_and_the_means_of_its_vectors():
    p, values, q = torch.rand(5, 2), torch.rand(2, 1), torch.rand(2, 7)
    found = adalora.triplet_scores(p, values, q)
    for i in range(2):
        expected = values[i, 0] + sum(p[j, i] for j in range(5)) / 5 + sum(q[i, j] for j in range(7)) / 7
        torch.testing.assert_close(found[i], expected)


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5), st.data())
def test_the_best_triplets_of_all_modules_are_kept_and_exactly_as_many_as_may(values, data):
    scores = [torch.tensor(v, dtype=torch.float32) for v in values]
    budget = data.draw(st.integers(0, sum(map(len, values))))
    keep = keep_best(scores, budget)
    assert [len(k) for k in keep] == [len(v) for v in values]
    flat, chosen = torch.cat(scores), torch.cat(keep)
    assert int(chosen.sum()) == budget
    if 0 < budget < len(flat):
        assert flat[chosen].min() >= flat[~chosen].max()
        ties = (flat == flat[chosen].min()).nonzero().flatten().tolist()
        kept = [i for i in ties if chosen[i]]
        assert kept == ties[: len(kept)]


def test_the_regulariser_is_zero_for_orthonormal_factors_and_its_formula_else():
    torch.manual_seed(0)
    p, q = torch.linalg.qr(torch.randn(7, 3))[0], torch.linalg.qr(torch.randn(5, 3))[0].T
    assert float(adalora.orthogonality([(p, q)])) < 1e-5
    p2, q2 = torch.randn(4, 2), torch.randn(2, 3)
    norms = [((m - torch.eye(len(m))) ** 2).sum().sqrt() for m in (p2.T @ p2, q2 @ q2.T)]
    torch.testing.assert_close(adalora.orthogonality([(p, q), (p2, q2)]), sum(norms) / 4, rtol=1e-5, atol=1e-5)


def attached(rank=4, seed=0, **options):
    config = veneer.AdapterConfig(rank=rank, alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    bank = veneer.attach(model := tiny_llama(), config, seed=seed)
    values = {"target_rank": 2, "tinit": 2, "tfinal": 3, "deltaT": 2} | options
    return model, bank, AdaLora(bank, "default", AdaLoraConfig(**values), 12)


def batch():
    return torch.randint(1, 400, (2, 9), generator=torch.Generator().manual_seed(1))


def train(model, ada, steps, optimizer=None, first=1):
    optimizer = optimizer or torch.optim.AdamW(ada.parameters().values(), lr=2e-2)
    ids = batch()
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        ada.backward()
        optimizer.step()
        ada.step(step)
    return optimizer


@pytest.mark.parametrize("every, tfinal", [(1, 3), (2, 3), (3, 0)])
def test_ranks_masks_and_weights_are_those_of_pefts_adalora_step_by_step(every, tfinal):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    theirs = peft.get_peft_model(
        tiny_llama(),
        peft.AdaLoraConfig(
            init_r=4, target_r=2, tinit=2, tfinal=tfinal, deltaT=every, total_step=12, lora_alpha=6,
            target_modules=["q_proj", "v_proj", "down_proj"], orth_reg_weight=0.3, beta1=0.7, beta2=0.9,
            task_type="CAUSAL_LM",  # else PEFT leaves the regulariser out
        ),
    )  # fmt: skip
    model, bank, ada = attached(tfinal=tfinal, deltaT=every, orthogonality=0.3, beta1=0.7, beta2=0.9)
    named = dict(theirs.named_parameters())
    reference = {name: named[f"base_model.model.{name}.default"] for name in ada.parameters()}
    with torch.no_grad():
        for name, parameter in ada.parameters().items():
            if not name.endswith("lora_E"):
                parameter.copy_(reference[name])
    optimizer = torch.optim.AdamW([reference[name] for name in reference], lr=2e-2)
    mine, ids, pruned = torch.optim.AdamW(ada.parameters().values(), lr=2e-2), batch(), 0
    for step in range(1, 13):
        for name, parameter in ada.parameters().items():  # the same point in both: differences do not add up
            with torch.no_grad():
                parameter.copy_(reference[name])
        ada._write()
        optimizer.zero_grad()
        theirs(input_ids=ids, labels=ids).loss.backward()
        for parameter in reference.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        train(model, ada, 1, mine, first=step)
        for name, parameter in ada.parameters().items():
            grad = reference[name].grad
            scale = float(grad.abs().max())
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-5 + 1e-4 * scale)
            if step < 12 - tfinal:
                path, _, leaf = name.rpartition(".")
                allocator, key = theirs.base_model.rankallocator, f"{path}.{leaf}.default"
                for own, their in zip(ada.averages[name], (allocator.exp_avg_ipt[key], allocator.exp_avg_unc[key])):
                    torch.testing.assert_close(own, their, rtol=1e-2, atol=1e-3 * float(their.max()))
            if name.endswith("lora_E"):
                assert torch.equal(parameter == 0, reference[name] == 0), (step, name)
        for path, keep in ada.keep.items():
            pattern = (theirs.peft_config["default"].rank_pattern or {}).get(f"{path}.lora_E.default")
            assert pattern is None or keep.tolist() == pattern, (step, path)
            pruned += pattern is not None
    assert pruned >= 7 * 3 and sum(ada.ranks().values()) == 2 * len(ada.paths)
    assert len(set(ada.ranks().values())) > 1  # it did choose


def test_the_layer_computes_p_lambda_q_and_masked_triplets_give_nothing():
    model, bank, ada = attached()
    train(model, ada, 12)
    for path in ada.paths:
        p, q, values = bank.layers[path].lora_B["default"], ada.right[path], ada.values[path]
        expected = 6 / 4 * p.double() @ torch.diag(values.double().flatten()) @ q.double()
        torch.testing.assert_close(bank.layers[path].delta("default").double(), expected, rtol=1e-5, atol=1e-7)
        assert (values.flatten()[~ada.keep[path]] == 0).all() and (values.flatten()[ada.keep[path]] != 0).all()


def test_finished_it_is_a_plain_lora_with_the_same_answers_here_and_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model, bank, ada = attached(target_rank=1)
    train(model, ada, 12)
    ids = batch()
    before, ranks = model(input_ids=ids).logits.detach(), ada.ranks()
    base = tiny_llama()(input_ids=ids).logits
    assert (before - base).abs().max() > 1e-3
    dropped = ada.finish()
    assert dropped == [path for path, rank in ranks.items() if rank == 0] and dropped
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    veneer.save_adapter(model, tmp_path / "a")
    again = tiny_llama()
    loaded = veneer.load_adapter(again, tmp_path / "a")
    assert {p: layer.rank["default"] for p, layer in loaded.layers.items()} == {p: r for p, r in ranks.items() if r}
    torch.testing.assert_close(again(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    assert theirs.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(theirs(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)


def test_state_brings_a_run_back_exactly():
    model, bank, ada = attached()
    optimizer = train(model, ada, 7)
    state = {k: v.clone() for k, v in ada.state().items()}
    adapter = {n: p.detach().clone() for n, p in bank.parameters("default").items()}
    moments = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in ada.parameters().values()]
    train(model, ada, 5, optimizer, first=8)
    model2, bank2, ada2 = attached(seed=9)
    with torch.no_grad():
        for name, parameter in bank2.parameters("default").items():
            parameter.copy_(adapter[name])
    ada2.load_state(state)
    optimizer2 = torch.optim.AdamW(ada2.parameters().values(), lr=2e-2)
    for parameter, moment in zip(ada2.parameters().values(), moments):
        optimizer2.state[parameter] = moment
    train(model2, ada2, 5, optimizer2, first=8)
    for (name, one), two in zip(ada.parameters().items(), ada2.parameters().values()):
        assert torch.equal(one, two), name
    assert ada.ranks() == ada2.ranks()
    with pytest.raises(RunError, match="does not belong"):
        ada2.load_state({k: v for k, v in state.items() if not k.endswith("keep")})


def test_a_target_above_the_first_rank_and_an_adapter_without_any_rank_are_refused():
    with pytest.raises(ConfigError, match="not below the rank 4"):
        attached(target_rank=4)
    model, bank, ada = attached()
    with pytest.raises(RunError, match="no module keeps a rank"):
        adalora.prune(bank, "default", {path: torch.zeros(4, dtype=torch.bool) for path in ada.paths})


def test_a_name_that_ends_another_names_only_itself(tmp_path):
    """rank_pattern keys match name endings: the patterns written must not mean two modules."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("fc", torch.nn.Linear(6, 6))
    model.add_module("zblock", torch.nn.Sequential())
    model.zblock.add_module("fc", torch.nn.Linear(6, 6))
    bank = veneer.attach(model, veneer.AdapterConfig(rank=3, target_modules=["fc"]))
    for p in bank.parameters("default").values():
        p.data.normal_()
    adalora.prune(bank, "default", {"fc": torch.tensor([1, 0, 0]).bool(), "zblock.fc": torch.tensor([1, 1, 0]).bool()})
    x = torch.randn(2, 6)
    expected = model(x)
    veneer.save_adapter(model, tmp_path / "a")
    veneer.detach(model)
    veneer.load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(model(x), expected)


class Mixed(torch.nn.Module):
    """An embedding, a convolution and a linear."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = torch.nn.Embedding(9, 6), torch.nn.Conv1d(6, 8, 3)
        self.groups, self.head = torch.nn.Conv1d(8, 8, 1, groups=2), torch.nn.Linear(8, 5)

    def forward(self, ids):
        return self.head(self.groups(torch.tanh(self.conv(self.embed(ids).transpose(1, 2)))).transpose(1, 2))


def test_embeddings_and_convolutions_have_ranks_too():
    torch.manual_seed(0)
    model, ids = Mixed(), torch.randint(0, 9, (4, 7))
    before = model(ids)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=4, target_modules=["embed", "conv", "head"]), seed=0)
    ada = AdaLora(bank, "default", AdaLoraConfig(target_rank=2, tinit=2, tfinal=3), 12)
    torch.testing.assert_close(model(ids), before)
    optimizer = torch.optim.AdamW(ada.parameters().values(), lr=2e-2)
    for step in range(1, 13):
        optimizer.zero_grad()
        (model(ids) - 1).square().mean().backward()
        a = {path: bank.layers[path].lora_A["default"].grad.clone() for path in ada.paths}
        values, right = ({k: v.detach().clone() for k, v in held.items()} for held in (ada.values, ada.right))
        config, ada.config = ada.config, ada.config.model_copy(update={"orthogonality": 0.0})
        ada.backward()  # by the chain rule of A = Λ∘Q alone
        for path in ada.paths:
            flat, q = a[path].flatten(1), right[path].flatten(1)
            torch.testing.assert_close(ada.values[path].grad.flatten(), torch.einsum("ri,ri->r", flat, q))
            torch.testing.assert_close(ada.right[path].grad.flatten(1), torch.diag(values[path].flatten()) @ flat)
        ada.config = config
        optimizer.step()
        ada.step(step)
    found = model(ids)
    assert (found - before).abs().max() > 1e-3 and sum(ada.ranks().values()) == 6
    ada.finish()
    torch.testing.assert_close(model(ids), found)


def test_a_grouped_convolution_is_refused():
    bank = veneer.attach(Mixed(), veneer.AdapterConfig(rank=4, target_modules=["groups"]))
    with pytest.raises(veneer.VeneerError, match="grouped convolutions"):
        AdaLora(bank, "default", AdaLoraConfig(target_rank=2, tinit=2, tfinal=3), 12)


def test_attach_alone_does_not_pretend_to_do_adalora():
    with pytest.raises(ConfigError, match="the training loop's"):
        veneer.attach(tiny_llama(), veneer.AdapterConfig(adalora={"target_rank": 4}))
