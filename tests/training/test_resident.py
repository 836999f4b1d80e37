"""Some blocks of a streamed base stay on the device: a run's setting, which changes no result."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from streamed_steps import save

import veneer
from conftest import tiny_llama
from veneer.base.stream_load import load_streamed
from veneer.cli.main import main
from veneer.config import TrainConfig
from veneer.errors import ConfigError
from veneer.plan import bytes as size
from veneer.plan.fit import Budget
from veneer.plan.here import Machine
from veneer.plan.profile import profile
from veneer.plan.roofline import Rates
from veneer.training import budget
from veneer.training.loop import Trainer, train
from veneer.training.streamed import StreamedRows

BLOCKS = 5


@pytest.fixture
def cli(capsys):
    """`cli("train", …)`: a command's exit code and what it says of an error."""

    def command(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code, capsys.readouterr().err

    return command


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory, tokenizer):
    return save(tiny_llama(num_hidden_layers=BLOCKS), tmp_path_factory.mktemp("llama"), tokenizer)


def run(folder, data, out, **options):
    options = {
        "epochs": 2,
        "max_steps": 3,
        "batch_size": 6,
        "micro_batch_tokens": 64,
        "save_every": 2,
        "lr": 5e-3,
    } | options
    return TrainConfig(
        model=str(folder), data=str(data), out=str(out), device="cpu", train=options, adapter={"rank": 4}
    )


def result(out):
    """(losses and gradient norms, the adapter's weights) of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [(r["step"], r["loss"], r["grad_norm"]) for r in lines if r["type"] == "train"]
    return losses, load_file(out / "adapter" / "adapter_model.safetensors")


def same(out, wanted):
    (losses, weights), (own_losses, own) = result(out), result(wanted)
    assert losses == own_losses and weights.keys() == own.keys()
    assert all(torch.equal(weights[name], own[name]) for name in own)


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    rows = [
        [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": f"{i * i}"}] for i in range(12)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def plain(llama_dir, chat_file, tmp_path_factory):
    """A run on a base that does not stream."""
    out = tmp_path_factory.mktemp("plain") / "run"
    train(run(llama_dir, chat_file, out))
    return out


@pytest.mark.parametrize("where, resident", [("host", 0), ("host", 1), ("host", BLOCKS), ("disk", 2)])
def test_results_are_those_of_any_other_base(llama_dir, chat_file, tmp_path, plain, where, resident):
    trainer = Trainer(run(llama_dir, chat_file, tmp_path / "run", stream=where, resident_blocks=resident))
    trainer.run()
    assert len(trainer.model.veneer_stream.conveyor.stay) == resident
    same(tmp_path / "run", plain)


def test_from_the_command_line(cli, llama_dir, chat_file, tmp_path, plain):
    settings = [
        "--epochs",
        "2",
        "--max-steps",
        "3",
        "--batch-size",
        "6",
        "--lr",
        "5e-3",
        "--rank",
        "4",
        "--device",
        "cpu",
    ]
    settings += ["--set", "train.micro_batch_tokens=64", "--set", "train.save_every=2"]
    base = ["train", "-m", llama_dir, "-d", chat_file, "-o", tmp_path / "run", *settings]
    for more, words in (([], "train.stream is off"), (["--stream", "host"], "6 is more than the model's 5 blocks")):
        code, said = cli(*base, *more, "--set", "train.resident_blocks=6", "--dry-run")
        assert code == 2 and words in said and said.count("\n") == 1
    code, said = cli(*base, "--stream", "host", "--set", "train.resident_blocks=1")
    assert code == 0, said
    same(tmp_path / "run", plain)


@pytest.mark.parametrize("value", ["some", -1, 1.5, True])
def test_what_is_no_number_of_blocks(value):
    with pytest.raises(ConfigError, match="train.resident_blocks': should be auto or a number of blocks") as raised:
        TrainConfig(data="x", out="y", train={"stream": "host", "resident_blocks": value})
    assert "\n" not in str(raised.value)


def test_stream_off_has_none():
    with pytest.raises(ConfigError, match="train.stream is off"):
        TrainConfig(data="x", out="y", train={"resident_blocks": 3})
    for value in ("auto", 0):
        assert TrainConfig(data="x", out="y", train={"resident_blocks": value}).train.resident_blocks == value


def test_more_than_there_are(llama_dir):
    with pytest.raises(ConfigError, match="6 is more than the model's 5 blocks"):
        load_streamed(llama_dir, device="cpu", resident=6)


def test_a_run_resumes_with_another_number(cli, llama_dir, chat_file, tmp_path, plain):
    first = Trainer(
        run(llama_dir, chat_file, tmp_path / "run", stream="host", resident_blocks=2),
        observe=lambda r: r["type"] == "train" and r["step"] == 2 and setattr(first, "_interrupted", 1),
    )
    assert first.run().stopped == "interrupted"
    kept = budget.adopt(run(llama_dir, chat_file, tmp_path / "run", stream="host"), tmp_path / "run")
    assert kept.train.resident_blocks == 2
    moved = budget.adopt(run(llama_dir, chat_file, tmp_path / "run", stream="disk"), tmp_path / "run")
    assert moved.train.resident_blocks == "auto"
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for folder, more in (("run", ["--set", "train.resident_blocks=4"]), ("other", ["--stream", "off"])):
        code, said = cli("train", tmp_path / folder, "--resume", *more)
        assert code == 0, said
        same(tmp_path / folder, plain)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("resident", range(BLOCKS + 1))
def test_what_is_copied_and_held_is_what_a_plan_counts(llama_dir, packed, resident):
    """A pass forward and one backward after the first ones, with a buffer to compute from as compiled blocks have, or not."""
    model = load_streamed(llama_dir, device="cpu", resident=resident)[0]
    conveyor, blocks = model.veneer_stream.conveyor, model.veneer_stream.conveyor.blocks
    if packed:
        spots, _, sizes = zip(*(block.spots([]) for block in blocks))
        conveyor.arrange(spots, max(sizes))
    for _ in range(2):
        before = conveyor.copied
        for order in (range(BLOCKS), range(BLOCKS - 1, -1, -1)):
            for at, i in enumerate(order):
                with conveyor.use(i, order[at + 1 :]) as views:
                    assert all(torch.equal(v, leaf.home) for v, leaf in zip(views, blocks[i].leaves))
    setting = size.Setting("none", "recompute", 64, 64, 64, compile=packed, stream="host", resident=resident)
    assert conveyor.copied - before == 2 * len(size.copied(setting, BLOCKS)) * blocks[0].nbytes
    said = profile(llama_dir, veneer.AdapterConfig(rank=4), dtype="float32")
    beside = said.blocks[0].beside * 4 if packed else 0  # of the adapter's factors, which are not there yet
    head = (said.head or said.embedding) * 4 + said.rest * 4
    buffers = size.base_bytes(said, setting) - beside - head
    assert buffers <= conveyor.nbytes <= buffers + (resident + 3) * 256 * len(blocks[0].leaves)


class Once(StreamedRows):
    """Runs out of memory in its first step."""

    failed = 0

    def backward(self, *arguments):
        Once.failed += 1
        if Once.failed == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().backward(*arguments)


def test_out_of_memory_they_go_first(llama_dir, chat_file, tmp_path, monkeypatch, plain):
    monkeypatch.setattr("veneer.training.gradients.StreamedRows", Once)
    Once.failed, notes = 0, []
    config = run(llama_dir, chat_file, tmp_path / "run", stream="host", resident_blocks=3, checkpointing="recompute")
    trainer = Trainer(config, observe=lambda r: notes.append(r["text"]) if r["type"] == "note" else None)
    trainer.run()
    (said,) = [note for note in notes if "out of memory" in note]
    assert "checkpointing recompute" in said and "no blocks stay on the device" in said
    assert not trainer.model.veneer_stream.conveyor.stay
    same(tmp_path / "run", plain)


def test_auto_is_the_plans_choice(llama_dir, chat_file, tmp_path, monkeypatch):
    """On a card whose copies are slow, with memory left over: as many as there are; with fast ones: none, still auto."""
    for copy, wanted in ((1e6, BLOCKS), (1e15, "auto")):
        rates = Rates(1e12, 1e11, copy, 1e9, 1e-5)
        card = Machine("a card", Budget(2e9, 64e9), rates, "float32", "equal", False)
        monkeypatch.setattr(budget, "machine", lambda *_: card)  # noqa: B023
        config = run(llama_dir, chat_file, tmp_path / "run", stream="host", vram="2GB", compile="off")
        chosen, plan = budget.choose(config, lambda line: None)
        assert chosen.train.resident_blocks == wanted and plan.chosen.setting.stream == "host"
        fixed = config.model_copy(deep=True)
        fixed.train.resident_blocks = 1
        assert budget.choose(fixed, lambda line: None)[0].train.resident_blocks == 1
    alone = run(llama_dir, chat_file, tmp_path / "run", stream="host")
    assert budget.choose(alone, print) == (alone, None)  # and without a plan none
