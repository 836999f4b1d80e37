"""How the server process ends: answers that run, answers that wait, disks that are slow."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serve.served import write

SLOW = """
import time, torch
torch.set_num_threads(1)
from veneer.serve import runner, registry
forward, read = runner.Runner._forward, registry.read_content

def slow_forward(*given, **options):
    time.sleep(0.05)
    return forward(*given, **options)

def slow_read(path, *given):
    if path.name == "slow":
        print("reading", flush=True)
        time.sleep(100)
    return read(path, *given)

runner.Runner._forward, registry.read_content = slow_forward, slow_read
from veneer.cli.main import main
main()
"""
LONG = {"model": "tiny", "prompt": "hello", "max_tokens": 200, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def serve(model_dir, tmp_path):
    """`serve(drain)` → (process, client, port): two slots, a token in 50 ms, an adapter that takes 100 s to read."""
    started = []
    (tmp_path / "allowed").mkdir()
    write(tmp_path / "allowed" / "slow", 1)

    def make(drain):
        command = [sys.executable, "-c", SLOW, "serve", str(model_dir), "--port", "0", "--device", "cpu"]
        command += ["--name", "tiny", "--slots", "2", "--context", "256", "--drain", str(drain)]
        command += ["--allow", str(tmp_path / "allowed")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
        started.append(process)
        said = ""
        while not (found := re.search(r"at http://127\.0\.0\.1:(\d+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        url = f"http://127.0.0.1:{found[1]}/v1"
        return process, openai.OpenAI(base_url=url, api_key="k", max_retries=0, timeout=60), int(found[1])

    yield make
    for process in started:
        process.kill()
        process.wait()


def check_ended(process, since, seconds):
    """The process ends with code 0 and no traceback, long before its answers or its disk would have."""
    assert process.wait(30) == 0 and time.monotonic() - since < seconds
    assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("drain, signals", [(0, [signal.SIGINT]), (60, [signal.SIGTERM] * 2)])
def test_answers_that_are_cut_off_are_told(serve, drain, signals):
    process, client, _ = serve(drain)

    def stream():
        with pytest.raises(openai.APIError, match="shutting down"):
            for _ in client.completions.create(**LONG, stream=True):
                pass

    def whole():
        with pytest.raises(openai.InternalServerError, match="shutting down") as raised:
            client.completions.create(**LONG)
        assert raised.value.status_code == 503

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(each) for each in (stream, whole, stream, whole)]  # two of them wait for a slot
        while client.get("/../metrics", cast_to=str).count("veneer_waiting 2.0") == 0:
            time.sleep(0.02)
        since = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.2)
        for one in asked:
            one.result(20)
    check_ended(process, since, 8)


@pytest.mark.parametrize("signals", ["one", "on and on"])
def test_a_slow_disk_does_not_hold_it_up(serve, signals):
    process, client, port = serve(1)
    body = json.dumps({"lora_name": "slow", "lora_path": "slow"})
    head = f"POST /v1/load_lora_adapter HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", port)) as holding:
        holding.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
        assert process.stdout.readline() == "reading\n"
        since = time.monotonic()
        process.send_signal(signal.SIGTERM)
        while signals == "on and on" and process.poll() is None and time.monotonic() - since < 15:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.02)
        check_ended(process, since, 15)


def test_signals_that_come_early_or_while_python_ends_do_not_kill_it(serve):
    process, _, _ = serve(1)  # its address is told before the server has handlers of its own
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert process.returncode == 0 and "Traceback" not in process.stderr.read()
