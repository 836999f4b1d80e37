import pytest

from veneer.errors import ConfigError
from veneer.serve.folders import find_adapters, name_adapters, short_name
from veneer.serve.names import NAME


def adapter(path):
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return path


def test_what_a_folder_offers(tmp_path):
    runs, outside = tmp_path / "runs", adapter(tmp_path / "outside")
    plain, run = adapter(runs / "plain"), adapter(runs / "run" / "adapter")
    (runs / "run" / "config.yaml").write_text("")
    (runs / "empty").mkdir()
    (runs / "file").write_text("")
    (runs / "link").symlink_to(outside)
    (runs / "half").mkdir()
    (runs / "half" / "adapter").symlink_to(outside)
    adapter(runs / "deep" / "er" / "adapter")
    assert find_adapters(runs) == [plain, run]
    assert find_adapters(plain) == [plain] and find_adapters(runs / "run") == [run]
    assert find_adapters(runs / "none") == find_adapters(runs / "empty") == find_adapters(runs / "file") == []
    assert name_adapters([runs]) == {"plain": plain, "run": run}


@pytest.mark.parametrize(
    "name, found", [("a b", "a-b"), ("..x", "x"), ("Größe", "Gr-e"), ("x" * 300, "x" * 128), ("-", "adapter")]
)
def test_names(tmp_path, name, found):
    assert short_name(tmp_path / name[:200]) == found and NAME.fullmatch(found)


def test_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        name_adapters([tmp_path / "none"])
    with pytest.raises(ConfigError, match="holds no adapter"):
        name_adapters([tmp_path])
    adapter(tmp_path / "a" / "x y"), adapter(tmp_path / "b" / "x-y")
    with pytest.raises(ConfigError, match="both be called 'x-y'"):
        name_adapters([tmp_path / "a", tmp_path / "b"])
