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
    with pytest.raises(VeneerError, match="no adapter is loaded: /add PATH"):
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
        (f"/add {two / 'one'} one", "already has an adapter 'one'"),
    ):
        with pytest.raises(VeneerError, match=word):
            adapters.run(line)
        assert bank.active == {"other": 0.5}, line


@pytest.fixture
def loud(tmp_path, model_dir):
    """An adapter that says something else than the base, and the answers to "hello" at several weights of it."""
    model, tokenizer = veneer.load_base(model_dir)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=3, alpha=6), seed=5)
    for parameter in bank.parameters("default").values():
        torch.nn.init.normal_(parameter.data, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    folder = veneer.save_adapter(model, tmp_path / "my adapters" / "loud one")
    answers, hello = {}, [{"role": "user", "content": "hello"}]
    for weight in (0, 1, 0.5, -2):
        bank.activate({"default": weight})
        answers[weight] = "".join(veneer.stream(model, tokenizer, hello, max_new_tokens=6)) + "\n"
    return folder, answers


@pytest.fixture
def chat(cli, monkeypatch):
    """`chat([what, to, chat, with], *lines)`: talk, with a /reset after each line that is no command."""

    def run(arguments, *lines):
        script = [line if line.startswith("/") else f"{line}\n/reset" for line in lines]
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(script)))
        return cli("chat", *arguments, "--max-new-tokens", 6)

    return run


def test_adapters_change_while_it_runs(chat, trained, loud):
    folder, answers = loud
    assert len(set(answers.values())) == 4
    lines = ["/use loud-one", "hello", "/weight loud-one 0.5", "hello", "/stack run=0 loud-one=-2", "hello", "/off"]
    done = chat([trained], f"/add {str(folder)!r}", *lines, "hello", "/adapters", "/quit")
    assert done.code == 0 and "error" not in done.err, done.err
    assert done.out == "".join(answers[w] for w in (1, 0.5, -2, 0))
    said = [line.removeprefix("adapters: ") for line in done.err.splitlines() if line.startswith("adapters: ")]
    assert said == ["run × 1, loud-one (off)", "run (off), loud-one × 1", "run (off), loud-one × 0.5",
                    "run × 0, loud-one × -2", *["run (off), loud-one (off)"] * 2]  # fmt: skip


def test_several_adapters_are_named_apart(chat, cli, trained, loud):
    done = chat([trained, loud[0], trained], "/adapters", "/help")
    assert done.code == 0, done.err
    assert "adapters: run × 1, loud-one (off), run-2 (off)" in done.err
    assert "/weight NAME W " in done.err and "/system TEXT " in done.err
    assert cli("chat", trained, trained / "nothing").code == 2


def test_an_adapter_is_added_to_a_bare_base(chat, model_dir, loud):
    folder, answers = loud
    done = chat(["--model", model_dir], "hello", "/compare", "/use a", f"/add {str(folder)!r} a", "/off", "hello",
                "/use a", "hello", "/compare", "hello")  # fmt: skip
    assert done.code == 0 and done.err.count("error:") == 2, done.err
    assert "no adapter to compare" in done.err and "no adapter is loaded: /add PATH" in done.err
    assert done.out == answers[0] * 2 + answers[1] + "base> " + answers[0] + "adapter> " + answers[1]


@pytest.mark.parametrize(
    "line, words",
    [
        ("/use nobody", "no adapter 'nobody' here; there are: run"),
        ("/use run run", "/use takes one name"),
        ("/stack", "/stack takes names"),
        ("/stack run=1 run=2", "twice"),
        ("/stack run=nan", "not a finite number"),
        ("/weight run", "/weight takes a name and a number"),
        ("/weight nobody 0", "no adapter 'nobody'"),
        ("/off now", "nothing more"),
        ("/add nowhere", "no such run or adapter directory"),
        ("/add 'nowhere", "No closing quotation"),
        ("/add", "/add PATH [NAME]"),
        ("/add {run} a.b", "use letters, digits"),
    ],
)
def test_a_wrong_command_is_one_line_and_changes_nothing(chat, trained, line, words):
    done = chat([trained], line.format(run=trained), "/adapters", "hello")
    errors = [text for text in done.err.splitlines() if text.startswith("error:")]
    assert done.code == 0 and len(errors) == 1 and words in errors[0], done.err
    assert done.err.splitlines()[-1] == "adapters: run × 1" and done.out.endswith("\n")
