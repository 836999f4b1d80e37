"""The package's shape: imports go one way, every module stands alone, --help is quick, files stay short."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import veneer

ROOT = Path(veneer.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
COMMON = {"errors", "config", "files", "version"}
MAY_IMPORT = {
    "errors": set(),
    "version": set(),
    "files": {"errors"},
    "combinations": set(),
    "sections": {"errors"},
    "config": {"errors", "sections", "combinations"},
    "kernels": {"errors"},
    "adapter": COMMON | {"kernels"},
    "base": COMMON | {"kernels", "adapter"},
    "formats": COMMON | {"kernels", "adapter", "base"},
    "interop": COMMON | {"kernels", "adapter", "base", "formats"},
    "data": COMMON | {"base"},
    "training": COMMON | {"kernels", "adapter", "base", "formats", "data", "plan"},
    "plan": COMMON | {"adapter", "base", "formats"},
    "serve": COMMON | {"kernels", "adapter", "base", "formats", "data"},
    "report": COMMON | {"adapter", "formats", "data", "training", "plan"},
    "cli": COMMON | {"adapter", "base", "formats", "data", "training", "plan", "report", "serve"},
    "__main__": {"cli"},
}
"""What each part of the package may import besides itself. `veneer/__init__.py` offers names of all of them."""


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The parts of veneer that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("veneer.")} - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    part = part_of(path)
    if part != "__init__":
        assert imported(path) <= MAY_IMPORT[part] | {part}


def test_no_file_is_long():
    assert {path.name: count for path in FILES if (count := len(path.read_text().splitlines())) > 450} == {}


def test_every_module_imports_alone(tmp_path):
    """Each in a process of its own that has loaded nothing of Veneer before."""
    names = [m.name for m in pkgutil.walk_packages([str(ROOT)], "veneer.") if not m.name.endswith("__main__")]
    if find_spec("triton") is None:
        names = [name for name in names if not name.endswith("_triton")]
    code = (
        "import gc, importlib, os, sys\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(name)\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'veneer']:\n"
        "    del sys.modules[name]\n"  # what they need from elsewhere stays loaded
        "sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False\n"  # each is compiled once
        "gc.freeze()\n"  # or each child would copy what is loaded
        "failed = []\n"
        "for name in sys.argv[2:]:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "        except BaseException as error:\n"
        "            print(name, repr(error), file=sys.stderr)\n"
        "            os._exit(1)\n"
        "        os._exit(0)\n"
        "    if os.waitpid(child, 0)[1]:\n"
        "        failed.append(name)\n"
        "sys.exit(bool(failed))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(names) > 40


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["train", "--help"], ["explain", "--help"], ["sweep", "--help"]],
    ids=" ".join,
)
def test_help_does_not_wait_for_torch(arguments):
    code = (
        "import sys\nfrom veneer.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_public_names():
    for name in veneer.__all__:
        assert getattr(veneer, name) is not None
