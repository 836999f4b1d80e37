"""Adapters switched, stacked and weighted while chatting: each answer is the stack's own."""

import io

import pytest
import torch

import veneer
from veneer.cli.chat_adapters import Adapters
from veneer.errors import VeneerError

pytest_plugins = ["commands"]


@pytest.fixture
def two(model_dir, tmp_path):
    """Two more adapters of the tiny base on disk."""
    for i, name in enumerate(("one", "two")):
        model, _ = veneer.load_base(model_dir, device="cpu")
        bank = veneer.attach(model, veneer.AdapterConfig(rank=2 + i), seed=i)
        for p in bank.parameters("default").values():
            p.data.normal_(generator=torch.Generator().manual_seed(i + p.numel()))
        veneer.save_adapter(model, tmp_path / name)
    return tmp_path


def test_commands_set_the_stack(two, model_dir):
    model, tokenizer = veneer.load_base(model_dir, device="cpu")
    adapters = Adapters(model, tokenizer, force=False)
    assert adapters.run("hello") is None and adapters.run("/what") is None
    with pytest.raises(VeneerError, match="no adapter is attached"):
        adapters.run("/use one")
    assert adapters.run(f"/add {two / 'one'}") == "adapters: one × 1"
    assert adapters.run(f"/add {two / 'two'} other") == "adapters: one × 1, other (off)"
    bank = veneer.get_bank(model)
    for line, active in (
        ("/use other", {"other": 1.0}),
        ("/stack one=0.7 other=-0.3", {"one": 0.7, "other": -0.3}),
        ("/weight one 2", {"one": 2.0, "other": -0.3}),
        ("/weight other 0", {"one": 2.0}),
        ("/stack one other=0.5", {"one": 1.0, "other": 0.5}),
        ("/off", {}),
        ("/adapters", {}),
        ("/weight other 0.5", {"other": 0.5}),
    ):
        adapters.run(line)
        assert bank.active == active, line
    for line, word in (
        ("/use nobody", "no adapter 'nobody'"),
        ("/use", "one name"),
        ("/stack one=x", "'x' is not a number"),
        ("/weight one inf", "finite"),
        ("/add /nowhere", "nowhere"),
        (f"/add {two / 'one'}", "already has an adapter 'one'"),
    ):
        with pytest.raises(VeneerError, match=word):
            adapters.run(line)
        assert bank.active == {"other": 0.5}, line


def test_in_the_chat(cli, trained, two, monkeypatch):
    lines = [
        "/adapters",
        "hello",
        "/use one",
        "hello",
        "/off",
        "hello",
        "/use nobody",
        "/stack one=0.5 default=1",
        "/quit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    done = cli("chat", trained, "--adapter", two / "one", "--max-new-tokens", 3, "--force")
    assert done.code == 0, done.err
    assert "default × 1, one (off)" in done.err and "one × 1" in done.err and "default × 1, one × 0.5" in done.err
    assert done.err.count("error:") == 1 and "nobody" in done.err
