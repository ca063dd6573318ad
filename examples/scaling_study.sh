#!/usr/bin/env bash
# The scaling study of docs/results/scaling.md on the embedded data: learning rates of two recipes and of one rate for all
# widths, then our recipe. The tables of the other recipe need the rate that its search will find, and are not there yet.
#   bash examples/scaling_study.sh                     everything that has no result yet; hours on two cores
#   bash examples/scaling_study.sh rates grid          some parts: rates grid depth conservative predict largest report
# Each run's line of results is written when it ends, to docs/results/scaling: killed or interrupted, call it again, today or
# on another machine. `predict` writes what the largest run should give from all smaller ones; commit it before `largest`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh"
cd "$root"

data=runs/data/three-sources sweeps=examples/sweeps/study results=docs/results/scaling
[ -f "$data/header.json" ] || megagnn prepare examples/data/three-sources.tar.xz --out "$data" >/dev/null
[ $# -gt 0 ] || set -- rates grid depth conservative predict largest report

sweep() { megagnn sweep "$sweeps/$1.toml"; }

# All runs of the recipe, but for the learning-rate searches and the conservative ones.
runs() {
  local name
  for name in ours depth-ours largest-ours; do
    [ ! -f "$results/$name.jsonl" ] || echo "$results/$name.jsonl"
  done
}

predict() { # from the smaller runs, for the size and data of the largest; once
  local file=$results/prediction-ours.json
  [ -f "$file" ] || megagnn fit "$results/ours.jsonl" --predict 1004881,9600 --json "$file"
}

for part in "$@"; do
  case $part in
    rates) sweep rates-mup && sweep rates-standard && sweep rates-study ;;
    grid) sweep ours ;;
    depth) sweep depth-ours ;;
    conservative) sweep conservative-ours ;;
    predict) predict ;;
    largest) sweep largest-ours ;;
    report)
      # shellcheck disable=SC2046
      megagnn report $(runs) --depth 3 --rates "$results"/rates-*.jsonl --out "$results/report.html" \
        --figures "$results/figures" --tensorboard runs/study/tensorboard
      ;;
    *) echo "scaling_study.sh: no part '$part'; there are rates grid depth conservative predict largest report" >&2 && exit 2 ;;
  esac
done
