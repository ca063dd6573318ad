#!/usr/bin/env bash
# The scaling study of docs/results/scaling.md on the embedded data: two recipes, both searched for a learning rate.
#   bash examples/scaling_study.sh                     everything that has no result yet; hours on two cores
#   bash examples/scaling_study.sh rates grid          some parts: rates grid depth conservative predict largest report
# Each run's line of results is written when it ends, to docs/results/scaling: killed or interrupted, call it again, today or
# on another machine. `predict` writes what the largest runs should give from all smaller ones; commit it before `largest`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh"
cd "$root"

data=runs/data/three-sources sweeps=examples/sweeps/study results=docs/results/scaling
[ -f "$data/header.json" ] || megagnn prepare examples/data/three-sources.tar.xz --out "$data" >/dev/null
[ $# -gt 0 ] || set -- rates grid depth conservative predict largest report

sweep() { megagnn sweep "$sweeps/$1.toml"; }

# All runs of both recipes, but for the learning-rate searches and the conservative ones.
runs() {
  local name
  for name in ours study depth-ours depth-study largest-ours largest-study; do
    [ ! -f "$results/$name.jsonl" ] || echo "$results/$name.jsonl"
  done
}

predict() { # from the smaller runs of three layers, for the size and data of the largest
  local size
  for recipe in ours study; do
    [ "$recipe" = ours ] && size=1004881 || size=997037
    [ -f "$results/prediction-$recipe.json" ] ||
      megagnn fit "$results/$recipe.jsonl" --predict "$size,9600" --json "$results/prediction-$recipe.json"
  done
}

for part in "$@"; do
  case $part in
    rates) sweep rates-mup && sweep rates-standard && sweep rates-study ;;
    grid) sweep ours && sweep study ;;
    depth) sweep depth-ours && sweep depth-study ;;
    conservative) sweep conservative-ours && sweep conservative-study ;;
    predict) predict ;;
    largest) sweep largest-ours && sweep largest-study ;;
    report)
      # shellcheck disable=SC2046
      megagnn report $(runs) --depth 3 --rates "$results"/rates-*.jsonl --out "$results/report.html" \
        --figures "$results/figures" --tensorboard runs/study/tensorboard
      ;;
    *) echo "scaling_study.sh: no part '$part'; there are rates grid depth conservative predict largest report" >&2 && exit 2 ;;
  esac
done
