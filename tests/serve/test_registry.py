"""What may be loaded, from where, and what is refused with a reason."""

from __future__ import annotations

import json
import mmap
import os
import threading
import time

import pytest
import torch
from serve.served import write

import veneer
from conftest import tiny_llama
from veneer.errors import AdapterFormatError, WrongBaseError
from veneer.serve import AdapterExists, AdapterRefused, Registry, ServeError, UnknownAdapter, content, stored


@pytest.fixture
def inside(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    write(folder / "a", 1)
    return folder


@pytest.fixture
def registry(inside):
    registry = Registry(tiny_llama(), allowed=[inside], max_rank=8)
    yield registry
    registry.close()


def test_a_loaded_adapter_is_known(registry, inside):
    info = registry.load("x.1_b-c", "a", pinned=True)
    assert info == registry.info("x.1_b-c")
    assert (info.path, info.rank, info.targets, info.pinned, info.tier) == (inside / "a", 4, 14, True, "host")
    assert registry.load("other", inside / "a").content == info.content
    assert registry.names() == ["x.1_b-c", "other"]
    assert len(registry._contents) == 1
    registry.unload("x.1_b-c")
    assert registry.names() == ["other"] and registry.tiers()["host"] == 1
    with pytest.raises(UnknownAdapter, match="there are: other"):
        registry.unload("x.1_b-c")
    with pytest.raises(AdapterExists):
        registry.load("other", "a")


def test_factors_are_packed_as_they_act(registry, inside):
    registry.load("a", "a")
    model = tiny_llama()
    bank = veneer.load_adapter(model, inside / "a", name="a")
    content = registry._names["a"]
    for path, (a, b) in content.factors(content.host).items():
        delta = bank.layers[path].delta("a")
        assert (b.t() @ a.t() - delta).abs().max() <= 1e-5 * delta.abs().max()


def test_the_content_hash_is_of_what_acts(registry, inside):
    first = registry.load("a", "a").content
    write(inside / "same", 1), write(inside / "other", 2)
    assert registry.load("b", "same").content == first != registry.load("c", "other").content
    fields = json.loads((inside / "same" / "adapter_config.json").read_text())
    (inside / "same" / "adapter_config.json").write_text(json.dumps(fields | {"lora_alpha": 99}))
    assert registry.load("d", "same").content != first


@pytest.mark.parametrize("name", ["", "../a", "a/b", "a b", "-a", "a;rm", "x" * 129, "a\n", "base:a", "a+b", "a*2"])
def test_names_that_are_refused(registry, name):
    with pytest.raises(AdapterRefused, match="name"):
        registry.load(name, "a")


def test_paths_outside_are_refused_and_do_not_say_what_is_there(registry, inside, tmp_path):
    write(tmp_path / "outside", 1)
    (inside / "link").symlink_to(tmp_path / "outside")
    os.makedirs(inside / "files")
    for file in (tmp_path / "outside").iterdir():
        (inside / "files" / file.name).symlink_to(file)
    for path in (
        "../outside",
        str(tmp_path / "outside"),
        "link",
        "a/../../outside",
        "/etc",
        "nothing",
        "",
        "a\0",
        "~",
        "x" * 5000,
    ):
        with pytest.raises(AdapterRefused) as refused:
            registry.load("x", path)
        assert str(tmp_path) not in str(refused.value)
    with pytest.raises(AdapterRefused, match="outside"):
        registry.load("x", "files")


def test_limits(registry, inside):
    write(inside / "large", 1, rank=9)
    with pytest.raises(AdapterRefused, match="rank 9"):
        registry.load("x", "large")
    registry.max_bytes = 1000
    with pytest.raises(AdapterRefused, match="bytes"):
        registry.load("x", "a")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"bias": "lora_only"}, "bias"),
    ],
)
def test_what_rows_cannot_share_is_refused(registry, inside, options, reason):
    model = tiny_llama(attention_bias=True)
    if "modules_to_save" in options:
        model = tiny_llama(attention_bias=True, tie_word_embeddings=False)
    bank = veneer.attach(model, veneer.AdapterConfig(rank=2, alpha=2, target_modules=["q_proj"], **options))
    assert bank
    veneer.save_adapter(model, inside / "odd")
    (inside / "odd" / "veneer.json").unlink()
    with pytest.raises(AdapterRefused, match=reason):
        registry.load("x", "odd")


def test_damaged_files_and_other_bases_are_refused(registry, inside):
    write(inside / "other", 1, model=tiny_llama(seed=5))
    with pytest.raises(WrongBaseError, match="load that base$"):  # a server has no --force
        registry.load("x", "other")
    write(inside / "wide", 1, model=tiny_llama(hidden_size=48))
    (inside / "wide" / "veneer.json").unlink()
    with pytest.raises(AdapterFormatError, match="factors"):
        registry.load("x", "wide")
    (inside / "a" / "adapter_model.safetensors").rename(inside / "a" / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="pickle"):
        registry.load("x", "a")
    (inside / "a" / "adapter_model.safetensors").write_bytes(b"\1" * 100)
    with pytest.raises(AdapterFormatError, match="damaged"):
        registry.load("x", "a")
    assert registry.names() == []


def test_host_slots_keep_the_ones_asked_for_last(inside):
    for n in range(2, 5):
        write(inside / f"a{n}", n)
    registry = Registry(tiny_llama(), allowed=[inside], host_slots=2)
    registry.load("p", "a", pinned=True)
    for n in range(2, 5):
        registry.load(f"a{n}", f"a{n}")
    assert [registry.info(name).tier for name in registry.names()] == ["host", "disk", "disk", "host"]
    held = registry.acquire(["a2"])
    held[0].loading.result(10)
    assert registry.ready(held[0]) and torch.isfinite(held[0].host).all()
    registry.release(held)
    assert [registry.info(name).tier for name in registry.names()] == ["host", "host", "disk", "disk"]
    registry.close()


@pytest.fixture
def again(registry, monkeypatch):
    """Loads an adapter of files that stand still, drops its factors, and reads them again: (content, hashed or not)."""
    monkeypatch.setattr(stored, "STILL", 0.0)
    hashed, whole = [], content._hash
    monkeypatch.setattr(content, "_hash", lambda adapter: hashed.append(adapter) or whole(adapter))

    def read(change=lambda: None, dtype=torch.float32):
        registry.dtype = dtype
        registry.load("a", "a", replace=True)
        held = registry._names["a"]
        before, held.host = held.host, None
        hashed.clear()
        time.sleep(0.02)  # more than a tick of the file system's clock
        change()
        registry._refill(held)
        assert torch.equal(held.host, before)
        return bool(hashed)

    return read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 1])
def test_files_that_are_the_same_are_not_hashed_again(again, inside, monkeypatch, dtype, shift):
    monkeypatch.setattr(stored, "MOST_PARTS", 3)
    write(inside / "a", 1 + shift, rank=3 + shift)
    assert not again(dtype=dtype) and not again(dtype=dtype)


def test_files_that_may_have_changed_are_hashed_again(again, inside, monkeypatch):
    file = inside / "a" / "adapter_model.safetensors"
    assert again(file.touch) and again((inside / "a" / "adapter_config.json").touch)
    monkeypatch.setattr(stored, "STILL", 3600.0)
    assert again()


def test_a_change_that_hides_its_time_is_refused(again, inside):
    file = inside / "a" / "adapter_model.safetensors"

    def change():
        times = file.stat()
        with open(file, "r+b") as handle:
            handle.seek(-4, os.SEEK_END)
            handle.write(b"\0\0\0\1")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    with pytest.raises(AdapterRefused, match="load it again"):
        again(change)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_change_during_reading_is_seen(again, inside, monkeypatch, replaced):
    """Another directory in its place, or other bytes in the file."""
    whole, file = stored._read_into, inside / "a" / "adapter_model.safetensors"

    def read_and_change(*arguments):
        whole(*arguments)
        if replaced:
            write(inside / "a", 7)
        else:
            with open(file, "r+b") as handle:
                handle.seek(-4, os.SEEK_END)
                handle.write(b"\0\0\0\1")

    monkeypatch.setattr(stored, "_read_into", read_and_change)
    with pytest.raises(AdapterRefused, match="load it again"):
        again()


def test_files_that_were_new_when_their_hashing_began_are_not_trusted(registry, inside, monkeypatch):
    """A clock of two seconds would not tell of a change after the bytes were read, however long hashing them took."""
    now, whole = [os.stat(inside / "a" / "adapter_model.safetensors").st_ctime + 1], content._hash
    monkeypatch.setattr(stored, "time", lambda: now[0])
    monkeypatch.setattr(content, "_hash", lambda adapter: now.append(now.pop() + 60) or whole(adapter))
    registry.load("a", "a")
    assert registry._names["a"].stored is None
    registry.load("a", "a", replace=True)
    assert registry._names["a"].stored is not None


def overwrite(file):
    """Other last bytes in the same file."""
    with open(file, "r+b") as handle:
        handle.seek(-4, os.SEEK_END)
        handle.write(b"\0\0\0\1")


def cut(file):
    os.truncate(file, 10)


@pytest.mark.parametrize("change", [overwrite, cut, os.unlink])
def test_what_is_hashed_is_what_is_served_whatever_happens_to_the_file(registry, inside, monkeypatch, change):
    registry.load("before", "a")
    monkeypatch.setattr(stored, "STILL", 0.0)
    file, whole = inside / "a" / "adapter_model.safetensors", content._hash
    before, read = registry._names.pop("before"), []

    def change_and_hash(adapter):
        read or change(file)
        read.append(adapter)
        return whole(adapter)

    monkeypatch.setattr(content, "_hash", change_and_hash)
    time.sleep(0.02)  # more than a tick of the file system's clock
    mine = registry._read(inside / "a")
    assert mine.hash == before.hash and torch.equal(mine.host, before.host) and mine.stored is None
    with pytest.raises((AdapterRefused, AdapterFormatError)):
        registry._refill(mine)


def test_a_link_that_led_elsewhere_while_it_was_hashed_is_seen(registry, inside, monkeypatch):
    monkeypatch.setattr(stored, "STILL", 0.0)
    write(inside / "b", 2)
    link = inside / "a" / "adapter_model.safetensors"
    files = inside / "a1", inside / "b" / "adapter_model.safetensors"
    link.rename(files[0])
    link.symlink_to(files[0])
    whole = content.read_adapter

    def read(*arguments, **options):
        for target in reversed(files):
            adapter = whole(*arguments, **options) if target is files[0] else None
            link.unlink()
            link.symlink_to(target)
        return adapter

    monkeypatch.setattr(content, "read_adapter", read)
    mine = registry._read(inside / "a")  # the bytes of b, by a name that is a's again
    monkeypatch.setattr(content, "read_adapter", whole)
    assert mine.hash == registry._read(inside / "b").hash and mine.stored is None
    with pytest.raises(AdapterRefused, match="load it again"):
        registry._refill(mine)


def put_over(inside):
    """Another adapter's tensors renamed to this one's, of one size, with its time of writing."""
    write(inside / "b", 2)
    file, other = (inside / name / "adapter_model.safetensors" for name in "ab")
    times = file.stat()
    assert other.stat().st_size == times.st_size
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, file)


def link_to_another(inside):
    write(inside / "b", 2)
    file = inside / "a" / "adapter_model.safetensors"
    file.unlink()
    file.symlink_to(inside / "b" / "adapter_model.safetensors")


def write_mapped(inside):
    """Other bytes through a shared mapping."""
    with open(inside / "a" / "adapter_model.safetensors", "r+b") as file, mmap.mmap(file.fileno(), 0) as bytes_:
        before = os.fstat(file.fileno()).st_ctime_ns
        bytes_[-4:] = b"\0\0\0\1"
        bytes_.flush()
        if os.fstat(file.fileno()).st_ctime_ns == before:
            pytest.skip("this file system does not tell of writes through mappings")


def remove(inside):
    os.unlink(inside / "a" / "adapter_model.safetensors")


def remove_config(inside):
    os.unlink(inside / "a" / "adapter_config.json")


@pytest.mark.parametrize("change", [put_over, link_to_another, write_mapped, remove, remove_config])
def test_other_files_of_the_same_size_or_none_are_refused(again, inside, change):
    with pytest.raises((AdapterRefused, AdapterFormatError)):
        again(lambda: change(inside))


def test_files_that_were_away_and_came_back_are_hashed_and_served(again, inside):
    def change():
        file = inside / "a" / "adapter_model.safetensors"
        file.write_bytes((file.rename(inside / "away")).read_bytes())

    assert again(change)


def test_a_file_that_became_shorter_is_refused(again, inside):
    file = inside / "a" / "adapter_model.safetensors"
    with pytest.raises((AdapterRefused, AdapterFormatError)):
        again(lambda: os.truncate(file, file.stat().st_size // 2))


def test_a_model_with_adapters_is_refused(inside):
    model = tiny_llama()
    veneer.load_adapter(model, inside / "a")
    with pytest.raises(ServeError, match="bare base"):
        Registry(model, allowed=[inside])


def test_a_pin_is_a_names_own(registry, inside):
    """It goes with its name, or when the name is loaded without it, whoever shares the content."""
    registry.load("one", "a")
    registry.load("two", "a", pinned=True)
    (content,) = registry._contents
    assert content.pinned and not registry.info("one").pinned and registry.info("two").pinned
    registry.load("two", "a", replace=True)
    assert not content.pinned and not registry.info("two").pinned
    registry.load("two", "a", replace=True, pinned=True)
    registry.unload("two")
    assert not content.pinned and not registry.info("one").pinned


@pytest.fixture
def on_disk(inside):
    """A registry with `other` in host memory, and `a` and `b`, of the same content, on disk: (registry, content)."""
    write(inside / "other", 2)
    write(inside / "b", 1)
    registry = Registry(tiny_llama(), allowed=[inside], host_slots=1)
    for name in ("a", "b", "other"):
        registry.load(name, name)
    assert registry.info("a").tier == "disk"
    yield registry, registry._names["a"]
    registry.close()


def wait_for(content):
    """Until a content has been read, or not."""
    loading = content.loading
    if loading is not None:
        loading.exception(20)


def test_a_failure_that_nobody_waited_for_is_forgotten(on_disk, monkeypatch):
    registry, content = on_disk
    gone = threading.Event()

    def fail(*given):
        gone.wait(20)
        raise AdapterRefused("the disk was away")

    with monkeypatch.context() as away:
        away.setattr("veneer.serve.registry.check_files", fail)
        registry.release(registry.acquire(["a"]))  # its client leaves while it is read
        gone.set()
        wait_for(content)
    held = registry.acquire(["a"])
    wait_for(content)
    assert registry.failure(content) is None and registry.ready(content)
    registry.release(held)


def test_a_failure_is_over_when_the_adapter_is_loaded_again(on_disk, inside):
    registry, content = on_disk
    for name in ("a", "b"):
        (inside / name).rename(inside / f"{name}-away")
    held = registry.acquire(["a"])
    wait_for(content)
    assert registry.failure(content)
    registry.load("a", "a-away", replace=True)
    assert registry.failure(content) is None and registry.ready(content)
    registry.release(held)


def test_files_of_another_name_that_changed_are_no_failure(on_disk, inside):
    registry, content = on_disk
    write(inside / "b", 3)  # the last of the two that was loaded
    held = registry.acquire(["a"])
    wait_for(content)
    assert registry.failure(content) is None and registry.ready(content)
    registry.release(held)
