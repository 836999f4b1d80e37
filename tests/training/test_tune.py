"""Weights of a combination learnt from examples: the gradient, and the way down."""

import pytest
import torch
from formats.adapters import put, saved

import veneer
from conftest import tiny_llama
from veneer.data.example import TokenizedExample
from veneer.errors import ConfigError, WrongBaseError
from veneer.training.forward import RowModel
from veneer.training.tune import WeightedStack, tune_weights


def stack_of(model, count=2):
    for i in range(count):
        options = {"rank": 3 + i, "alpha": 7.0, "target_modules": ["q_proj", "down_proj", "embed_tokens"]}
        put(model, str(i), i + 1, rslora=i == 0, tied_head="both", **options)
    return model


def examples():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 400, (n,), generator=generator).numpy().astype("int32") for n in (9, 14, 6)]
    return [TokenizedExample(row, row % 3 > 0) for row in ids]


def plain_loss(model, weights):
    """Mean loss per supervised token of the bank's own weighted stack, differentiable in the weights (n)."""
    veneer.get_bank(model).routing.stack = {str(i): w for i, w in enumerate(weights)}
    total, count = 0.0, 0
    for example in examples():
        ids = torch.from_numpy(example.input_ids).long()
        logits, hit = model(input_ids=ids[None]).logits[0, :-1], torch.from_numpy(example.supervised[1:])
        total = total + torch.nn.functional.cross_entropy(logits[hit], ids[1:][hit], reduction="sum")
        count += int(hit.sum())
    return total / count


@pytest.mark.parametrize("weights", [[0.7, -0.4], [0.0, 0.0], [1.0, 0.0]])
def test_the_gradient_is_that_of_the_weighted_stack(weights):
    model, w = stack_of(tiny_llama()), torch.tensor(weights, requires_grad=True)
    wanted = plain_loss(model, w)
    wanted.backward()
    rows = RowModel(model)
    packed = rows.pack(examples(), 64, True)
    with rows.attention():
        loss, gradient = WeightedStack(model, ["0", "1"]).loss_and_gradient(w.detach().double(), rows, packed)
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert torch.allclose(gradient, w.grad.double(), rtol=1e-4, atol=1e-5) and gradient.abs().min() > 1e-3


def test_tuning_lowers_the_loss_and_keeps_the_files(model_dir, chat_file, tmp_path):
    from transformers import AutoModelForCausalLM

    base = lambda: AutoModelForCausalLM.from_pretrained(model_dir).eval()  # noqa: E731
    ones = [saved(tmp_path / str(i), base(), i, rank=2 + i, target_modules=["q_proj", "v_proj"]) for i in range(2)]
    before = {file: file.read_bytes() for path in ones for file in path.iterdir()}
    data = str(chat_file)
    notes = []
    tuned = tune_weights(
        ones, data, str(model_dir), steps=12, lr=0.2, l1=0.0, examples=4, start=[1, 1], note=notes.append
    )
    assert tuned.after < tuned.before == tuned.losses[0] and tuned.after == min(tuned.losses)
    assert tuned.examples == 4 and len(tuned.losses) == 13 and any("4 examples" in note for note in notes)
    assert {file: file.read_bytes() for path in ones for file in path.iterdir()} == before
    pulled = tune_weights(ones, data, str(model_dir), steps=12, lr=0.2, l1=50.0, examples=4, start=[1, 1])
    assert sum(map(abs, pulled.weights)) < 0.5 * sum(map(abs, tuned.weights))
    with pytest.raises(ConfigError, match="3 weights"):
        tune_weights(ones, data, str(model_dir), start=[1, 2, 3])
    alien = saved(tmp_path / "alien", tiny_llama(seed=5))
    with pytest.raises(WrongBaseError):
        tune_weights([ones[0], alien], data, str(model_dir))
