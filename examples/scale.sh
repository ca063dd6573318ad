#!/usr/bin/env bash
# A sweep of examples/sweeps on the embedded data, then its laws and its report. The three scale_*.sh call it.
#   bash examples/scale.sh width [--processes N]     killed or interrupted, call it again: finished runs are kept
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=${1:?width, depth or data}
shift
. "$root/tools/setup_env.sh"
cd "$root"

data=runs/data/three-sources
[ -f "$data/header.json" ] || megagnn prepare examples/data/three-sources.tar.xz --out "$data" >/dev/null

sweep=examples/sweeps/$name.toml results=runs/sweeps/$name
megagnn sweep "$sweep" "$@"
megagnn fit "$results/runs.jsonl" --json "$results/fit.json"
megagnn report "$results/runs.jsonl" --out "$results/report.html" --figures "$results/figures" \
  --tensorboard "$results/tensorboard"
