import csv
import io
import json
import sys
import tempfile
import time
import types
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from veneer.data import hub
from veneer.data.example import Message
from veneer.data.load import content_hash, read_examples
from veneer.data.readers import read_rows
from veneer.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
PAIRS = [{"prompt": "a", "completion": "b"}, {"prompt": 'ü, "c"', "completion": "d\ne"}]


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(rows, delimiter=",") -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def failure(action) -> str:
    with pytest.raises(DataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


FILES = {
    "jsonl": ("f.jsonl", lines(*PAIRS), [":1", ":2"]),
    "ndjson, blank lines, CRLF": ("f.ndjson", "\r\n" + lines(*PAIRS).replace("\n", "\r\n\r\n"), [":2", ":4"]),
    "jsonl, byte order mark": ("f.jsonl", b"\xef\xbb\xbf" + lines(*PAIRS).encode(), [":1", ":2"]),
    "jsonl, no last newline": ("f.JSONL", lines(*PAIRS).rstrip(), [":1", ":2"]),
    "json array": ("f.json", json.dumps(PAIRS), [": item 1", ": item 2"]),
    "json array over lines": ("f.json", json.dumps(PAIRS, indent=2), [": item 1", ": item 2"]),
    "json object": ("f.json", json.dumps({"version": 1, "data": PAIRS}, indent=1), [": item 1", ": item 2"]),
    "json splits": ("f.json", json.dumps({"train": PAIRS, "test": []}), [": item 1", ": item 2"]),
    "jsonl named json": ("f.json", lines(*PAIRS), [":1", ":2"]),
    "csv": ("f.csv", table(PAIRS), [":2", ":3"]),
    "csv, byte order mark": ("f.csv", b"\xef\xbb\xbf" + table(PAIRS).encode(), [":2", ":3"]),
    "csv with semicolons": ("f.csv", table(PAIRS, ";"), [":2", ":3"]),
    "tsv": ("f.tsv", table(PAIRS, "\t"), [":2", ":3"]),
}


@pytest.mark.parametrize(("name", "content", "where"), FILES.values(), ids=FILES.keys())
def test_every_file_type_gives_the_same_rows(tmp_path, name, content, where):
    path = put(tmp_path / name, content)
    rows = list(read_rows(path))
    assert [row.values for row in rows] == PAIRS
    assert [row.where for row in rows] == [f"{path}{end}" for end in where]


def test_parquet_rows_are_numbered_across_batches(tmp_path):
    rows = [{"text": f"t{number}"} for number in range(600)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet", row_group_size=250)
    read = list(read_rows(str(tmp_path / "f.parquet")))
    assert [row.values for row in read] == rows
    assert read[599].where == f"{tmp_path / 'f.parquet'}: row 600"


def test_text_files_give_paragraphs(tmp_path):
    path = put(tmp_path / "f.txt", "\n\none\r\ntwo\r\n \r\n\r\n  three\n")
    assert [(row.values["text"], row.where) for row in read_rows(path)] == [
        ("one\ntwo", f"{path}:3"),
        ("  three", f"{path}:7"),
    ]


def test_a_single_object_in_a_json_file_is_one_row(tmp_path):
    assert [row.values for row in read_rows(put(tmp_path / "f.json", json.dumps(CHAT, indent=1)))] == [CHAT]


def test_a_line_number_after_a_field_of_several_lines(tmp_path):
    path = put(tmp_path / "f.csv", 'text\n"a\nb"\n\nc\n')
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:5"]


def test_long_csv_fields_are_read(tmp_path):
    assert len(next(read_rows(put(tmp_path / "f.csv", "text\n" + "x" * 300_000))).values["text"]) == 300_000


def test_a_folder_gives_its_data_files_in_order(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", ".cache/x.jsonl", "README.md", "notes.log"):
        put(tmp_path / name, lines({"text": name}))
    assert [row.values["text"] for row in read_rows(tmp_path)] == ["a/z.jsonl", "b.jsonl"]


def test_jsonl_is_streamed(tmp_path):
    path = put(tmp_path / "f.jsonl", lines({"text": "good"}) + "{broken")
    assert next(read_rows(path)).values == {"text": "good"}


BAD_FILES = {
    "empty": ("f.jsonl", "", "f.jsonl: holds no rows"),
    "empty json": ("f.json", " \n", "f.json: holds no rows"),
    "empty array": ("f.json", "[]", "f.json: holds no rows"),
    "empty csv": ("f.csv", "", "f.csv: holds no rows"),
    "header alone": ("f.csv", "text\n", "f.csv: holds no rows"),
    "blank text": ("f.txt", "\n \n", "f.txt: holds no rows"),
    "broken line": ("f.jsonl", lines(CHAT) + "{'a': 1}\n", "f.jsonl:2: broken JSON: Expecting property name"),
    "object over lines": ("f.jsonl", json.dumps(CHAT, indent=1), "f.jsonl:1: broken JSON"),
    "deep nesting": ("f.jsonl", "[" * 100_000, "f.jsonl:1: broken JSON"),
    "long number": ("f.jsonl", "9" * 5_000, "f.jsonl:1: "),
    "list as row": ("f.jsonl", "[1]\n", "f.jsonl:1: the row is a list, not an object"),
    "text as item": ("f.json", '[{"text": "a"}, "b"]', "f.json: item 2: the row is text, not an object"),
    "broken array": ("f.json", '[\n{"text": "a"},\n{"text" "b"}]', "f.json:3: broken JSON: Expecting ':' delimiter"),
    "number": ("f.json", "3", "f.json: holds a number; expected a list of objects"),
    "two lists": ("f.json", '{"a": [], "b": []}', "f.json: the object holds 2 lists (a, b)"),
    "no list": ("f.json", '{"a": 1}', "f.json: the object holds no list of rows"),
    "latin-1 jsonl": ("f.jsonl", b'{"text": "ok"}\n{"text": "\xfc"}\n', "f.jsonl:2: not valid UTF-8"),
    "latin-1 json": ("f.json", b'[\n{"text": "\xfc"}]', "f.json:2: not valid UTF-8"),
    "latin-1 csv": ("f.csv", b"text\nok\n\xfc\n", "f.csv:3: not valid UTF-8"),
    "latin-1 text": ("f.txt", b"ok\n\n\xfc\n", "f.txt:3: not valid UTF-8"),
    "utf-16": ("f.jsonl", lines(CHAT).encode("utf-16"), "f.jsonl: text in UTF-16; save it as UTF-8"),
    "utf-16 json": ("f.json", json.dumps([CHAT]).encode("utf-16"), "f.json: text in UTF-16; save it as UTF-8"),
    "fields missing": ("f.csv", "prompt,completion\na\n", "f.csv:2: wrong number of fields: 1, and the header has 2"),
    "open quote": ("f.csv", 'text\nok\n"a\nb\n', "f.csv:3: broken CSV: unexpected end of data"),
    "header twice": ("f.csv", "text,text\na,b\n", "f.csv:1: the header names 'text' twice"),
    "broken cell": ("f.csv", 'messages\n"[{"\n', "f.csv:2: broken JSON in column 'messages'"),
    "not parquet": ("f.parquet", "PAR1 hello", "f.parquet: not a readable Parquet file: "),
    "empty parquet": ("f.parquet", "", "f.parquet: not a readable Parquet file: "),
    "unknown type": ("f.docx", "x", "f.docx: unknown file type '.docx'; rename or convert it to one of .jsonl"),
    "packed": ("f.jsonl.gz", b"\x1f\x8b", "f.jsonl.gz: compressed data are not read; unpack the file first"),
    "no extension": ("data", "x", "data: a file without an extension; rename or convert"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files_say_where_and_what(tmp_path, name, content, message):
    path = put(tmp_path / name, content)
    assert failure(lambda: list(read_rows(path))).startswith(f"{tmp_path}/{message}")


def test_truncated_parquet_is_an_error(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist([CHAT] * 50), tmp_path / "f.parquet")
    data = (tmp_path / "f.parquet").read_bytes()
    put(tmp_path / "f.parquet", data[:8] + bytes(len(data) // 3) + data[8 + len(data) // 3 :])
    assert "not a readable Parquet file" in failure(lambda: list(read_rows(tmp_path / "f.parquet")))


def test_a_missing_file_names_near_misses(tmp_path):
    put(tmp_path / "train.jsonl", lines(CHAT))
    assert failure(lambda: read_examples(tmp_path / "trian.jsonl")).endswith("no such file; did you mean train.jsonl?")
    assert "check the name" in failure(lambda: read_examples(tmp_path / "zzz.csv"))
    assert "does not exist" in failure(lambda: read_examples(tmp_path / "no" / "f.csv"))


def test_a_near_miss_wins_over_the_hub(tmp_path, monkeypatch):
    put(tmp_path / "data" / "train" / "a.jsonl", lines(CHAT))
    monkeypatch.chdir(tmp_path)
    assert failure(lambda: read_examples("data/trian")).endswith("did you mean train?")


def test_a_folder_without_data_is_an_error(tmp_path):
    put(tmp_path / "README.md", "x")
    assert "no data files in this folder; known are .jsonl" in failure(lambda: read_examples(tmp_path))


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    module = types.ModuleType("veneer.data.bundled")
    module.bundled_path = lambda split="train": put(tmp_path / f"{split}.jsonl", lines({"text": split}))
    monkeypatch.setitem(sys.modules, "veneer.data.bundled", module)


def test_bundled_data_is_named_so(bundled):
    rows = [row for source in ("bundled", "bundled:heldout") for row in read_rows(source)]
    assert [(row.values["text"], row.where) for row in rows] == [
        ("train", "bundled:1"),
        ("heldout", "bundled:heldout:1"),
    ]
    assert content_hash("bundled") != content_hash("bundled:heldout")


class FakeDataset(list):
    _fingerprint = "f1"


@pytest.fixture
def fake_hub(monkeypatch):
    """A hub that has every data set, and what was asked of it."""
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        if split == "nope":
            raise ValueError("Unknown split\n'nope'")
        return FakeDataset(PAIRS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return asked


def test_hub_rows_are_numbered(fake_hub):
    rows = list(read_rows("owner/name:main", split="test"))
    assert fake_hub == [("owner/name", "main", "test")]
    assert [row.values for row in rows] == PAIRS and rows[1].where == "owner/name:main[test]: row 2"
    assert content_hash("owner/name") != content_hash("owner/name", split="test")


def test_hub_errors_are_one_line(fake_hub):
    message = failure(lambda: list(read_rows("owner/name", split="nope")))
    assert message == "owner/name[nope]: the hub data set cannot be read: Unknown split 'nope'"


def test_hub_data_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install veneer[hub]" in failure(lambda: list(read_rows("owner/name")))


@pytest.mark.parametrize("hangs", [True, False])
def test_an_unreachable_hub_is_an_error_in_seconds(fake_hub, monkeypatch, hangs):
    def dataset_info(self, name, timeout):
        time.sleep(30 if hangs else 0)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.2)
    start = time.monotonic()
    message = failure(lambda: list(read_rows("owner/name")))
    assert "no such file here, and the hub cannot be reached; give a local file" in message
    assert time.monotonic() - start < 5 and not fake_hub


def test_examples_can_be_read_twice_and_limited(tmp_path):
    reader = read_examples(put(tmp_path / "f.jsonl", lines(CHAT, CHAT, CHAT)), limit=2)
    first = list(reader)
    assert first == list(reader) and reader.read == 2
    assert reader.format == "messages" and first[1].where.endswith("f.jsonl:2")


def test_each_file_has_its_own_format(tmp_path):
    put(tmp_path / "a.jsonl", lines(CHAT))
    put(tmp_path / "b.csv", table(PAIRS))
    reader = read_examples([tmp_path, str(tmp_path / "a.jsonl")])
    assert len(list(reader)) == 4
    assert reader.format == "messages, completion"


def test_a_row_of_another_format_is_bad(tmp_path):
    path = put(tmp_path / "f.jsonl", lines(CHAT, {"text": "a"}))
    message = failure(lambda: list(read_examples(path)))
    assert message.startswith(f"{path}:2: another format than the rows before: text, not messages")


def test_skipping_counts_and_goes_on(tmp_path):
    bad = [{"messages": []}, {"messages": [{"role": "boss", "content": "x"}]}, {"other": 1}, {"text": "a"}]
    content = lines(*bad[:1]) + "{broken\n[1]\n" + lines(CHAT, *bad, CHAT)
    reader = read_examples(put(tmp_path / "f.jsonl", content.encode() + b"\xff\n"), on_bad_row="skip")
    assert [example.where.rsplit(":")[-1] for example in reader] == ["4", "9"]
    assert (reader.read, reader.skipped) == (2, 8)
    assert reader.skip_reasons == {
        "nothing to learn from": 2,
        "broken JSON": 1,
        "the row is a list, not an object": 1,
        "unknown role": 1,
        "unknown format": 1,
        "another format than the rows before": 1,
        "not valid UTF-8": 1,
    }
    assert len(reader.skipped_where) == 5 and ":2: broken JSON" in reader.skipped_where[1]


def test_no_example_at_all_is_an_error(tmp_path):
    path = put(tmp_path / "f.jsonl", lines({"a": 1}, {"b": 1}))
    assert "no usable row: all 2 were skipped" in failure(lambda: list(read_examples(path, on_bad_row="skip")))
    message = failure(lambda: list(read_examples(path)))
    assert "f.jsonl:1: unknown format: found the keys 'a'; expected 'messages'" in message
    assert "no data source given" in failure(lambda: read_examples([]))


def test_unknown_options_are_refused(tmp_path):
    assert "unknown data format 'csv'" in failure(lambda: read_examples(tmp_path, format="csv"))
    assert "unknown on_bad_row 'ignore'" in failure(lambda: read_examples(tmp_path, on_bad_row="ignore"))


def test_the_content_hash_follows_bytes_and_names_alone(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    for folder in (one, two):
        put(folder / "a.jsonl", lines(CHAT))
        put(folder / "b.jsonl", lines(*PAIRS))
    before = content_hash(one)
    assert before == content_hash(two) and before != content_hash([one / "b.jsonl", one / "a.jsonl"])
    put(two / "b.jsonl", lines(*PAIRS, *PAIRS))
    assert content_hash(two) != before
    (one / "b.jsonl").rename(one / "c.jsonl")
    assert content_hash(one) != before


def write_rows(folder: Path, suffix: str, rows: list[dict]) -> Path:
    path = folder / f"f{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix in (".csv", ".tsv"):
        cells = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
        put(path, table(cells, "\t" if suffix == ".tsv" else ","))
    elif suffix == ".json":
        put(path, json.dumps(rows, ensure_ascii=False))
    else:
        put(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


content = st.text(st.characters(codec="utf-8"), max_size=20)
answer = content.filter(str.strip)
user, assistant = st.builds(Message, st.just("user"), content), st.builds(Message, st.just("assistant"), answer)
conversation = st.lists(st.tuples(user, assistant).map(list), min_size=1, max_size=3).map(lambda turns: sum(turns, []))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    conversations=st.lists(conversation, min_size=1, max_size=4),
    keys=st.sampled_from([("messages", "role", "content"), ("conversations", "from", "value")]),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]),
)
def test_conversations_survive_every_format_and_file_type(conversations, keys, suffix):
    name, role, text = keys
    rows = [{name: [{role: turn.role, text: turn.content} for turn in turns]} for turns in conversations]
    with tempfile.TemporaryDirectory() as folder:
        read = list(read_examples(write_rows(Path(folder), suffix, rows)))
    assert [list(example.messages) for example in read] == conversations


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pairs=st.lists(st.tuples(content, answer), min_size=1, max_size=4), suffix=st.sampled_from([".csv", ".parquet"]))
def test_pairs_survive_tables(pairs, suffix):
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"f{suffix}"
        put(path, table(rows)) if suffix == ".csv" else write_rows(Path(folder), suffix, rows)
        read = [(example.prompt, example.completion) for example in read_examples(path)]
    assert read == pairs


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.binary(max_size=60), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".parquet"]))
def test_any_bytes_give_rows_or_a_data_error(data, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder) / f"f{suffix}", data)
        try:
            assert all(isinstance(row.values, dict) for row in read_rows(path))
        except DataError as error:
            assert str(error).startswith(str(path))
