#!/usr/bin/env bash
# The scaling study of docs/results/scaling.md on the embedded data: our recipe and the study's, learning rates first, what
# lies between the two recipes, then size and data, depth, conservative forces, and the largest runs, predicted before.
#   bash examples/scaling_study.sh                     everything that has no result yet; hours on two cores
#   bash examples/scaling_study.sh rates grid          some parts, of those named below
# Each run's line of results is written when it ends, to docs/results/scaling: killed or interrupted, call it again, today or
# on another machine. `predict` writes what the largest run should give from all smaller ones; commit it before `largest`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh"
cd "$root"

parts="rates ablation grid predict largest depth conservative report"
data=runs/data/three-sources sweeps=examples/sweeps/study results=docs/results/scaling
[ -f "$data/header.json" ] || megagnn prepare examples/data/three-sources.tar.xz --out "$data" >/dev/null
# shellcheck disable=SC2086
[ $# -gt 0 ] || set -- $parts

sweep() { megagnn sweep "$sweeps/$1.toml"; }

# All runs of both recipes, but for the learning-rate searches and the conservative ones.
runs() {
  local name
  for name in {ours,depth-ours,largest-ours,study,depth-study,largest-study,basis}; do
    [ ! -f "$results/$name.jsonl" ] || echo "$results/$name.jsonl"
  done
}

predict() { # from the smaller runs of a recipe, the nearer and all of them, for the size and data of the largest; once
  local file=$results/prediction-$1.json all=$results/prediction-$1-all.json
  [ -f "$file" ] || megagnn fit "$results/$1.jsonl" --at-least 25000,960 --predict "$2" --json "$file"
  [ -f "$all" ] || megagnn fit "$results/$1.jsonl" --predict "$2" --json "$all"
}

for part in "$@"; do
  case $part in
    rates) sweep rates-mup && sweep rates-standard && sweep rates-study ;;
    ablation) sweep ablation ;;
    grid) sweep ours && sweep study && sweep basis ;;
    predict) predict ours 1004881,9600 && predict study 997037,9600 ;;
    largest) sweep largest-ours && sweep largest-study ;;
    depth) sweep depth-ours && sweep depth-study ;;
    conservative) sweep conservative-ours && sweep conservative-study ;;
    report)
      # shellcheck disable=SC2046
      megagnn report $(runs) --depth 3 --rates "$results"/rates-*.jsonl \
        --ablation "$results"/{rates-study,ablation,rates-standard,rates-mup}.jsonl \
        --out "$results/report.html" --figures "$results/figures" --tensorboard runs/study/tensorboard
      ;;
    *) echo "scaling_study.sh: no part '$part'; there are $parts" >&2 && exit 2 ;;
  esac
done
