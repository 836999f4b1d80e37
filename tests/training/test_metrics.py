import json
import sys

import pytest

from veneer.errors import ConfigError, RunError
from veneer.training.metrics import MetricsLog, read_metrics


def write(run_dir, steps):
    with MetricsLog(run_dir) as log:
        for step in steps:
            log.write({"type": "train", "step": step, "loss": 1.0 / step})


def test_records_are_readable_as_soon_as_written(tmp_path):
    log = MetricsLog(tmp_path / "new" / "run")
    log.write({"type": "train", "step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / "new" / "run") == [{"type": "train", "step": 1, "loss": 2.5}]
    log.write({"type": "eval", "step": 1, "loss": 0.7, "best": True})
    assert [record["type"] for record in read_metrics(tmp_path / "new" / "run")] == ["train", "eval"]
    log.close()


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_non_finite_numbers_stay_valid_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"type": "train", "step": 1, "loss": float("nan"), "grad_norm": float("inf"), "parts": [1.0, -1e400]})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line
    record = json.loads(line)
    assert record["loss"] is None and record["loss_text"] == "nan"
    assert record["grad_norm"] is None and record["grad_norm_text"] == "inf"
    assert record["parts"] == [1.0, None]


@pytest.mark.parametrize("torn", [b'{"type": "tr', b'{"type": "train", "step": 9}', "é".encode()[:1]])
def test_torn_last_line(tmp_path, torn):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [record["step"] for record in read_metrics(tmp_path)][:2] == [1, 2]
    write(tmp_path, [3])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_damage_before_the_last_line_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl:2: not a JSON record"):
        read_metrics(tmp_path)


def test_truncate_after_then_append(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write({"type": "train", "step": step})
        log.write({"type": "eval", "step": 5})
        log.truncate_after(3)
        log.write({"type": "train", "step": 4, "again": True})
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4] and records[-1]["again"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_truncate_after_tolerates_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1})
    log.write({"step": 2})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo')
    log.truncate_after(1)
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, ["tensorboard"]) as log:
        log.write({"type": "train", "step": 1, "loss": 2.0, "note": "text", "best": True})
        log.write({"type": "eval", "step": 2, "loss": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/loss", "train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_sink_names_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"pip install veneer\[{name}\]"):
        MetricsLog(tmp_path, [name])


def test_unknown_sink(tmp_path):
    with pytest.raises(ConfigError, match="unknown sink 'mlflow'"):
        MetricsLog(tmp_path, ["mlflow"])


class FakeWandb:
    """Records what wandb would have been asked."""

    def init(self, **options):
        self.options, self.logged, self.finished = options, [], False
        return self

    def log(self, numbers):
        self.logged.append(numbers)

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("key, mode", [(None, "offline"), ("k", "online")])
def test_wandb_is_offline_without_a_key(tmp_path, monkeypatch, key, mode):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with MetricsLog(tmp_path, ["wandb"]) as log:
        log.write({"type": "train", "step": 3, "loss": 2.0})
    assert fake.options["mode"] == mode and fake.finished
    assert fake.logged == [{"train/loss": 2.0, "step": 3}]


def test_a_sink_that_fails_is_dropped_and_the_run_goes_on(tmp_path, monkeypatch):
    class Broken(FakeWandb):
        def log(self, numbers):
            raise OSError("disk full")

    monkeypatch.setitem(sys.modules, "wandb", Broken())
    with MetricsLog(tmp_path, ["wandb"]) as log:
        with pytest.warns(UserWarning, match="wandb failed .* disk full"):
            log.write({"type": "train", "step": 1})
        log.write({"type": "train", "step": 2})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
