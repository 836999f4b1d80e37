#!/usr/bin/env bash
# usage: scripts/install.sh VENV [EXTRA]    make a virtual environment with Veneer in it (editable)
# Where there is no NVIDIA GPU, torch is a CPU build: the platform's own where pip finds one, else through uv, which
# knows where PyTorch keeps its CPU wheels. A finished install is recorded and not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 extra=${2:+[$2]}
python=${PYTHON:-python3}
stamp=$venv/.veneer-${2:-core}
wanted=$(cat pyproject.toml constraints.txt scripts/install.sh | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -qq --upgrade "pip>=25" "setuptools>=77" wheel

if ! "$venv/bin/python" -W ignore -c "import torch" 2>/dev/null; then
  torch=$(grep '^torch==' constraints.txt)
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    echo "installing torch for the NVIDIA GPU"
    pip install -qq "torch>=2.7"
  elif [ "$(uname -s)" != Linux ] || pip download -qq --no-deps --dest "$venv/.torch" --no-index ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} "$torch" 2>/dev/null; then
    echo "installing torch for the CPU"
    pip install -qq "$torch"
  else
    echo "installing torch for the CPU"
    pip install -qq uv
    "$venv/bin/uv" pip install -qq --python "$venv/bin/python" --torch-backend cpu "$torch"
  fi
  rm -rf "$venv/.torch"
fi
echo "installing veneer$extra"
if "$venv/bin/python" -W ignore -c "import torch, sys; sys.exit(torch.version.cuda is None)"; then
  pip install -qq --editable ".$extra"
else
  pip install -qq --constraint constraints.txt --editable ".$extra"
fi
echo "$wanted" > "$stamp"
