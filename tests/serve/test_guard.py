"""Who may ask the server what: keys, hosts, other pages, sizes; which adapters may be loaded, and what their names are."""

import json
import os
import shutil

import pytest
from starlette.testclient import TestClient

from conftest import tiny_llama
from veneer.adapter.attach import attach
from veneer.config import AdapterConfig
from veneer.errors import ConfigError
from veneer.formats.peft import save_adapter
from veneer.serve.app import create_app
from veneer.serve.guard import host_of, hosts_for
from veneer.serve.names import UnknownModel, parse_model
from veneer.serve.registry import Registry

pytest_plugins = ["over_http"]
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


def visit(served):
    return TestClient(served.app, base_url=served.url, raise_server_exceptions=False)


def test_key(serve):
    with serve(api_key="sécret") as served, visit(served) as http:
        for path in ("/health", "/", "/web/app.js", "/web/style.css"):
            assert http.get(path).status_code == 200
        for key in (None, "Bearer ", "Bearer wrong", "sécret", "Bearer sécret ", "bearer sécret"):
            for path in ("/v1/models", "/v1/adapters", "/metrics", "/openapi.json", "/other"):
                found = http.get(path, headers={"Authorization": key.encode()} if key else {})
                assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
            assert http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "y"}).status_code == 401
        right = {"Authorization": "Bearer sécret".encode()}
        assert http.get("/v1/models", headers=right).status_code == 200
        assert http.post("/v1/chat/completions", json=CHAT, headers=right).status_code == 200
        document = http.get("/openapi.json", headers=right).json()
        assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]


def test_other_hosts_and_pages_are_refused(serve):
    with serve(hosts=["localhost", "127.0.0.1", "::1"]) as served, visit(served) as http:
        port = served.url.rpartition(":")[2]
        for host in (f"localhost:{port}", "LOCALHOST", "127.0.0.1", f"[::1]:{port}"):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 200, host
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "",
            "[::1",
        ):
            assert http.get("/v1/models", headers={"Host": host}).status_code in (400, 403), host
        assert http.get("/v1/models", headers={"Origin": served.url}).status_code == 200
        for origin in ("http://evil.example", "null", f"http://localhost:{port}", "http://127.0.0.1:1", "http://["):
            found = http.post("/v1/chat/completions", json=CHAT, headers={"Origin": origin})
            assert found.status_code == 403, origin
            assert not [name for name in found.headers if name.startswith("access-control")]
        assert served.engine.tickets == []


def test_a_form_is_no_request(serve):
    """What a page may send without asking first: other content types."""
    with serve() as served, visit(served) as http:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            found = http.post("/v1/chat/completions", content=json.dumps(CHAT), headers={"Content-Type": kind})
            assert found.status_code == 400, kind
        assert served.engine.tickets == []


def test_bodies(serve):
    with serve() as served, visit(served) as http:
        json_type = {"Content-Type": "application/json"}

        def sent_in_parts():
            yield b'{"model": "'
            for _ in range(9):
                yield b"x" * 2**20
            yield b'"}'

        for content in (b"x" * (9 << 20), sent_in_parts()):
            found = http.post("/v1/completions", content=content, headers=json_type)
            assert found.status_code == 413 and "8 MiB" in found.json()["error"]["message"]
        for content in (
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"model": NaN, "prompt": "x"}',
            b'{"model": 5}',
        ):
            found = http.post("/v1/completions", content=content, headers=json_type)
            assert found.status_code == 400 and "\n" not in found.json()["error"]["message"], content[:20]
        assert http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
        assert http.get("/v1/completions").status_code == 405
        assert http.get("/web/../app.py").status_code == http.get("/web/%2e%2e/app.py").status_code == 404


def test_page_may_do_nothing_elsewhere(serve):
    with serve() as served:
        headers = visit(served).get("/").headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_hosts():
    assert [host_of(h) for h in ("A.b:80", "[::1]:8", "x.", "", "[", "a b")] == ["a.b", "::1", "x", "", "", "a b"]
    assert all(host in hosts_for(host) for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"))
    assert [hosts_for(h) for h in ("0.0.0.0", "::", "example.org", "192.168.1.1", "")] == [None] * 5
    assert "example.org" in hosts_for("0.0.0.0", ["example.org"])


@pytest.mark.parametrize(
    "model, found",
    [
        ("b/m", ()),
        ("base", ()),
        ("one", (("one", 1.0),)),
        ("b/m:one", (("one", 1.0),)),
        ("base:one*-0.25+t.w-o", (("one", -0.25), ("t.w-o", 1.0))),
        ("base: one * 1e-2 + t.w-o*0", (("one", 0.01), ("t.w-o", 0.0))),
    ],
)
def test_model_names(model, found):
    assert parse_model(model, "b/m", ["one", "t.w-o"]) == found


@pytest.mark.parametrize("model", ["", "two", "b/m:two", "b", "one*0.5", "other:one", "One", "../one", "one\0"])
def test_unknown_models(model):
    with pytest.raises(UnknownModel):
        parse_model(model, "b/m", ["one"])


@pytest.mark.parametrize(
    "stack",
    [
        "",
        "+",
        "one+",
        "one*",
        "one*x",
        "one*nan",
        "one*inf",
        "one*101",
        "one**2",
        "one+one",
        "on/e",
        "+".join("abcdefghi"),
    ],
)
def test_broken_stacks(stack):
    with pytest.raises(ConfigError):
        parse_model(f"base:{stack}", "b/m", ["one", *"abcdefghi"])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """(an allowed folder with two adapters and traps, a folder beside it)."""
    allowed, outside = tmp_path_factory.mktemp("allowed"), tmp_path_factory.mktemp("outside")
    for name, rank in (("good", 4), ("large", 12)):
        model = tiny_llama()
        attach(model, AdapterConfig(rank=rank), seed=1)
        save_adapter(model, allowed / name)
    save_adapter(model, outside / "secret")
    (allowed / "link").symlink_to(outside / "secret")
    (allowed / "linked-file").mkdir()
    for file in (allowed / "good").iterdir():
        if file.name != "adapter_model.safetensors":
            (allowed / "linked-file" / file.name).write_bytes(file.read_bytes())
    (allowed / "linked-file" / "adapter_model.safetensors").symlink_to(outside / "secret" / "adapter_model.safetensors")
    (allowed / "pickled").mkdir()
    (allowed / "pickled" / "adapter_config.json").write_bytes((allowed / "good" / "adapter_config.json").read_bytes())
    (allowed / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    return allowed, outside


@pytest.fixture
def http(adapters, tokenizer):
    registry = Registry(tiny_llama(), allowed=[adapters[0]], max_rank=8)

    class Engine:
        stats, limit, fault = staticmethod(dict), 8, None

    options = {"base": "tiny", "context": 64, "allowed": [adapters[0]]}
    app = create_app(Engine(), registry, tokenizer, registry.model, **options)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def test_load_and_unload_as_vllm_does(http, adapters):
    body = {"lora_name": "mine", "lora_path": str(adapters[0] / "good")}
    found = http.post("/v1/load_lora_adapter", json=body)
    assert (found.status_code, found.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["tiny", "mine"]
    again = http.post("/v1/load_lora_adapter", json=body)
    assert again.status_code == 400 and again.json()["error"]["type"] == "InvalidUserInput"
    assert "already been loaded" in again.json()["error"]["message"]
    assert http.post("/v1/load_lora_adapter", json=body | {"load_inplace": True, "pinned": True}).status_code == 200
    listed = http.get("/v1/adapters").json()
    assert [(one["name"], one["rank"], one["pinned"]) for one in listed["loaded"]] == [("mine", 4, True)]
    assert [one["name"] for one in listed["offered"]] == ["good", "large", "linked-file", "pickled"]
    found = http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
    assert (found.status_code, found.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
    assert gone.status_code == 404 and gone.json()["error"]["type"] == "NotFoundError"


@pytest.mark.parametrize(
    "path",
    [
        "{outside}/secret",
        "{allowed}/../{outside_name}/secret",
        "../{outside_name}/secret",
        "{allowed}/link",
        "{allowed}/linked-file",
        "{allowed}/pickled",
        "{allowed}/large",
        "{allowed}/nothing",
        "{allowed}",
        "/etc",
        "/proc/self/environ",
        "file://{allowed}/good",
        "~/x",
        "$(touch {outside}/ran)",
        "; touch {outside}/ran",
    ],
)
def test_paths_that_are_refused(http, adapters, path):
    allowed, outside = adapters
    path = path.format(allowed=allowed, outside=outside, outside_name=os.path.relpath(outside, allowed.parent))
    found = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path})
    assert found.status_code in (400, 403) and "\n" not in found.json()["error"]["message"]
    assert http.get("/v1/adapters").json()["loaded"] == [] and not (outside / "ran").exists()


@pytest.mark.parametrize("file", ["adapter_config.json", "veneer.json"])
def test_deeply_nested_files_are_refused(http, adapters, file):
    shutil.copytree(adapters[0] / "good", adapters[0] / "deep", dirs_exist_ok=True)
    (adapters[0] / "deep" / file).write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
    found = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "deep"})
    shutil.rmtree(adapters[0] / "deep")
    assert found.status_code == 400 and "damaged" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", ".x", "a b", "a;b", "$(x)", "a\0", "x" * 129, "tiny", "base", "a*b", "é"]
)
def test_names_that_are_refused(http, adapters, name):
    found = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(adapters[0] / "good")})
    assert found.status_code == 400 and http.get("/v1/adapters").json()["loaded"] == []
