"""The real default model, fetched once: it answers, it trains, and its adapter is PEFT's too."""

import pytest
import torch

import veneer
from veneer.data.score import parse_object
from veneer.training.forward import RowModel

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(2)
    return veneer.load_base("smollm2-135m-instruct", device="cpu")


def test_it_answers(base):
    (answer,) = veneer.generate(
        *base, [[{"role": "user", "content": "What is the capital of France?"}]], max_new_tokens=20
    )
    assert "Paris" in answer.text and answer.finish_reason == "stop"


def test_the_bundled_data_is_masked_to_its_answers(base):
    _, tokenizer = base
    data = veneer.prepare(veneer.read_examples("bundled"), tokenizer, content_hash="x", cache_dir=None)
    for i in range(0, len(data), 7):
        shown = tokenizer.decode(data[i].input_ids[data[i].supervised].tolist())
        assert parse_object(shown.removesuffix("<|im_end|>")) is not None and shown.endswith("<|im_end|>")
    assert data.counts.end_of_turn_untrained == 0 and not data.counts.dropped


def test_packed_rows_and_fast_head_hold_for_it(base):
    model, tokenizer = base
    data = veneer.prepare(veneer.read_examples("bundled", limit=4), tokenizer, content_hash="x", cache_dir=None)
    rows = RowModel(model)
    rows.check(list(data), required=True)
    assert rows.packing and rows.fast_head and not rows.notes


@pytest.mark.filterwarnings("ignore")
def test_a_run_teaches_it_and_peft_gives_the_same_logits(base, tmp_path):
    import peft

    seen = []
    result = veneer.train(
        {
            "model": "smollm2-135m-instruct",
            "data": "bundled",
            "out": str(tmp_path / "run"),
            "device": "cpu",
            "train": {"lr": 1e-3, "max_steps": 4, "batch_size": 2, "warmup": 0},
        },
        observe=seen.append,
    )
    losses = [r["loss"] for r in seen if r["type"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    ids = torch.arange(40).unsqueeze(0) * 97
    theirs_base, _ = veneer.load_base("smollm2-135m-instruct", device="cpu")
    theirs = peft.PeftModel.from_pretrained(theirs_base, result.adapter).eval()
    model, _ = veneer.load_base("smollm2-135m-instruct", device="cpu")
    veneer.load_adapter(model, result.adapter)
    with torch.no_grad():
        one, two = model(ids).logits, theirs(ids).logits
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * float(two.abs().max()))


def test_it_answers_in_nf4_and_learns_there(tmp_path):
    model, tokenizer = veneer.load_base("smollm2-135m-instruct", quant="nf4", device="cpu")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = veneer.generate(model, tokenizer, [question], max_new_tokens=20)
    assert "Paris" in answer.text
    seen = []
    options = {"lr": 1e-3, "max_steps": 4, "batch_size": 2, "warmup": 0}
    config = {"model": "smollm2-135m-instruct", "data": "bundled", "device": "cpu", "quant": "nf4", "train": options}
    veneer.train(config | {"out": str(tmp_path / "run")}, observe=seen.append)
    losses = [r["loss"] for r in seen if r["type"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
