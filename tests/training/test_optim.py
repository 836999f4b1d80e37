"""Learning rates, decay and gradients of the variants, against their formulas and against PEFT's optimisers."""

import pytest
import torch
from torch import nn

import veneer
from veneer.config import OptimConfig
from veneer.training.optim import lora_fa_gradient, make_optimizer, set_lr

peft = pytest.importorskip("peft")
optimizers = pytest.importorskip("peft.optimizers")


class Net(nn.Module):
    """An embedding, two linears (one with a bias), a norm and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 6, bias=False)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, ids):
        return self.head(self.norm(self.down(torch.tanh(self.up(self.embed(ids))))))


def net():
    torch.manual_seed(0)
    return Net()


LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"]}


def peft_name(name):
    """PEFT's name of a parameter in Veneer's form."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".base_layer", "")
    return name.replace(".default.weight", "").replace("lora_embedding_", "lora_").replace(".default", "")


def test_lora_plus_gives_each_parameter_the_rate_and_decay_that_peft_gives_it():
    config = peft.LoraConfig(**LORA | {"target_modules": ["embed", "up", "down"]}, modules_to_save=["head", "norm"])
    theirs = peft.get_peft_model(net(), config)
    expected = {id(p): peft_name(n) for n, p in theirs.named_parameters() if p.requires_grad}
    options = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.3, "loraplus_lr_embedding": 5e-6}
    made = optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, **options)
    expected = {
        expected[id(p)]: (pytest.approx(group["lr"]), group["weight_decay"])
        for group in made.param_groups
        for p in group["params"]
    }
    mine = {n: p for n, p in ((peft_name(n), p) for n, p in theirs.named_parameters() if p.requires_grad)}
    config = OptimConfig(lr=1e-3, lora_plus_ratio=16, weight_decay=0.3, lora_plus_embedding_lr=5e-6)
    optimizer = make_optimizer(mine, config, embeddings=["embed"])
    set_lr(optimizer, 1e-3)
    names = {id(p): n for n, p in mine.items()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found == expected
    assert {n for n in found if n.startswith("embed")} == {"embed.lora_A", "embed.lora_B"}
    set_lr(optimizer, 5e-4)  # the schedule scales every group
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(5e-4 * group["ratio"])


def test_lora_plus_without_an_embedding_rate_treats_embeddings_as_any_other_factors():
    parameters = {f"embed.lora_{x}": nn.Parameter(torch.randn(2, 2)) for x in "AB"}
    groups = make_optimizer(parameters, OptimConfig(lora_plus_ratio=4), embeddings=["embed"]).param_groups
    assert [g["ratio"] for g in groups] == [1, 4]


def test_frozen_parameters_are_no_business_of_the_optimiser():
    parameters = {"a.lora_A": nn.Parameter(torch.ones(2, 2), False), "a.lora_B": nn.Parameter(torch.ones(2, 2))}
    (group,) = make_optimizer(parameters, OptimConfig()).param_groups
    assert group["params"] == [parameters["a.lora_B"]]


@pytest.mark.parametrize("rank, d_in", [(3, 17), (5, 5), (4, 2)])
def test_lora_fa_gradient_is_the_nearest_to_the_full_gradient(rank, d_in):
    torch.manual_seed(0)
    full, lora_A, s = torch.randn(7, d_in), torch.randn(rank, d_in), 1.7
    found = lora_fa_gradient(s * full @ lora_A.T, lora_A, s)
    best = torch.linalg.lstsq(s * lora_A.double().T, full.double().T, driver="gelsd").solution.T
    torch.testing.assert_close(s * found.double() @ lora_A.double(), s * best @ lora_A.double(), rtol=1e-4, atol=1e-5)
    if rank <= d_in:
        torch.testing.assert_close(found.double(), best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_fa_follows_pefts_optimiser_step_by_step(rslora, monkeypatch):
    # PEFT multiplies in bfloat16 where it can; its formula is what is tested, so keep it in float32.
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**LORA, use_rslora=rslora))
    weights = {peft_name(n): p for n, p in theirs.named_parameters() if ".lora_" in n}
    config = veneer.AdapterConfig(rank=3, alpha=5, target_modules=["up", "down"], rslora=rslora, lora_fa=True)
    bank = veneer.attach(model := net(), config)
    parameters = bank.parameters("default")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    first = {n: p.detach().clone() for n, p in parameters.items()}
    options = OptimConfig(lr=1e-2, eps=1e-12)
    reference = optimizers.create_lorafa_optimizer(theirs, r=3, lora_alpha=5, lr=1e-2)
    reference.param_groups[0]["eps"] = 1e-12  # the two add epsilon before and after the bias correction
    optimizer = make_optimizer(parameters, options)
    ids = torch.randint(0, 11, (4, 6))
    for _ in range(6):
        for network, opt in ((theirs, reference), (model, optimizer)):
            opt.zero_grad()
            network(ids).logsumexp(-1).square().mean().backward()
            if opt is optimizer:
                for path in ("up", "down"):
                    b = parameters[f"{path}.lora_B"]
                    b.grad = lora_fa_gradient(
                        b.grad, parameters[f"{path}.lora_A"], bank.layers[path].scaling["default"]
                    )
            opt.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, weights[name], rtol=2e-4, atol=2e-6, msg=name)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, first[name]) == name.endswith("lora_A")


def test_lora_fa_corrects_a_convolution_as_the_matrix_that_it_is():
    torch.manual_seed(0)
    lora_A, grad = torch.randn(3, 5, 2), torch.randn(7, 3, 1)
    flat = lora_fa_gradient(grad.flatten(1), lora_A.flatten(1), 0.5)
    assert torch.equal(lora_fa_gradient(grad, lora_A, 0.5), flat.view(7, 3, 1))


def test_an_embedding_cannot_be_lora_fa_for_its_a_starts_at_zero():
    with pytest.raises(veneer.VeneerError, match="nothing would be learnt"):
        veneer.attach(net(), veneer.AdapterConfig(rank=2, target_modules=["embed"], lora_fa=True))
