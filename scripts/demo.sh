#!/usr/bin/env bash
# Train an adapter on the bundled data with the embedded default model, and show before and after.
set -euo pipefail
cd "$(dirname "$0")/.."
veneer=${VENEER:-.venv/bin/veneer}
run=${1:-runs/demo-$(date +%Y%m%d-%H%M%S)}
"$veneer" train recipes/demo.yaml --out "$run"
"$veneer" eval "$run" --limit 64 --batch-size 64
echo
echo "Try it:"
echo "  $veneer chat $run --compare        talk to base and adapter side by side"
echo "  $veneer eval $run                  all 160 held-out examples"
echo "  $veneer info $run                  what was trained"
echo "  $run/report.html                   open in a browser"
echo "Your own data:"
echo "  $veneer init chat                  a commented configuration to start from"
