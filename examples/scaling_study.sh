#!/usr/bin/env bash
# The scaling study of docs/results/scaling.md on the embedded data: our recipe and the study's, learning rates first, what
# lies between the two recipes, then size and data, depth, conservative forces, and the largest runs, predicted before; then both
# families with Muon, on up to ten times the data, which are labelled first.
#   bash examples/scaling_study.sh                     everything that has no result yet; hours on two cores
#   bash examples/scaling_study.sh rates grid          some parts, of those named below
# Each run's line of results is written when it ends, to docs/results/scaling: killed or interrupted, call it again, today or
# on another machine. `predict` writes what the largest run should give from all smaller ones; commit it before `largest`.
# `data` labels structures, for which tools/setup_env.sh labels installs the engines.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh"
cd "$root"

parts="rates ablation grid predict largest depth conservative report"
parts+=" muon-rates muon muon-ahead data muon-more muon-predict muon-largest muon-report"
data=runs/data/three-sources sweeps=examples/sweeps/study results=docs/results/scaling
[ -f "$data/header.json" ] || megagnn prepare examples/data/three-sources.tar.xz --out "$data" >/dev/null
# shellcheck disable=SC2086
[ $# -gt 0 ] || set -- $parts

sweep() { megagnn sweep "$sweeps/$1.toml"; }

label() { # sources, structures of each, store; once
  [ -f "runs/data/$3/header.json" ] || megagnn label --source "$1" --num "$2" --seed 0 --out "runs/data/$3" --keep-parts
}

more() { # source, structures, store: a larger job begins with the finished parts of a smaller one
  [ -d "runs/data/$3.parts" ] || { mkdir "runs/data/$3.parts" && cp -al "runs/data/study-38k.parts/$1" "runs/data/$3.parts/"; }
  label "$@"
}

# All runs of both recipes, but for the learning-rate searches and the conservative ones.
runs() {
  local name
  for name in {ours,depth-ours,largest-ours,study,depth-study,largest-study,basis}; do
    [ ! -f "$results/$name.jsonl" ] || echo "$results/$name.jsonl"
  done
}

predict() { # name, N,D, runs: what the largest should give, from the nearer of the smaller ones and from all; once
  local point=$2 file=$results/prediction-$1.json all=$results/prediction-$1-all.json
  shift 2
  [ -f "$file" ] || megagnn fit "$@" --at-least 25000,960 --predict "$point" --json "$file"
  [ -f "$all" ] || megagnn fit "$@" --predict "$point" --json "$all"
}

# Those runs of a family with Muon that there are: before its largest one, or with it.
smaller() { ls "$results/muon/$1"{,-30400,-95000}.jsonl 2>/dev/null || true; }
family() { smaller "$1" && { ls "$results/muon/largest-$1.jsonl" 2>/dev/null || true; }; }

for part in "$@"; do
  case $part in
    rates) sweep rates-mup && sweep rates-standard && sweep rates-study ;;
    ablation) sweep ablation ;;
    grid) sweep ours && sweep study && sweep basis ;;
    predict) predict ours 1004881,9600 "$results/ours.jsonl" && predict study 997037,9600 "$results/study.jsonl" ;;
    largest) sweep largest-ours && sweep largest-study ;;
    depth) sweep depth-ours && sweep depth-study ;;
    conservative) sweep conservative-ours && sweep conservative-study ;;
    report)
      # shellcheck disable=SC2046
      megagnn report $(runs) --depth 3 --rates "$results"/rates-*.jsonl \
        --ablation "$results"/{rates-study,ablation,rates-standard,rates-mup}.jsonl \
        --out "$results/report.html" --figures "$results/figures" --tensorboard runs/study/tensorboard
      ;;
    data) # three sources of 12,700 structures each, then more of each, of GFN1 molecules all that are found
      label molecules-gfn2,molecules-gfn1,slabs-emt 12700 study-38k
      more molecules-gfn2 50000 study-gfn2 && more slabs-emt 50000 study-emt && more molecules-gfn1 20000 study-gfn1
      ;;
    muon-rates) sweep muon/rates && sweep muon/radial ;;
    muon) sweep muon/egnn && sweep muon/cartesian ;;
    muon-ahead) # what the largest runs on 30,400 structures should give, from those on up to 9,600; before muon-more
      predict muon-egnn-30400 325921,30400 "$results/muon/egnn.jsonl"
      predict muon-cartesian-30400 320893,30400 "$results/muon/cartesian.jsonl"
      ;;
    muon-more) for name in {egnn,cartesian}-{30400,95000}; do sweep "muon/$name"; done ;;
    muon-predict)
      # shellcheck disable=SC2046
      predict muon-egnn 325921,95000 $(smaller egnn)
      # shellcheck disable=SC2046
      predict muon-cartesian 320893,95000 $(smaller cartesian)
      ;;
    muon-largest) sweep muon/largest-egnn && sweep muon/largest-cartesian ;;
    muon-report)
      # shellcheck disable=SC2046
      megagnn report $(family egnn) $(family cartesian) "$results"/{,largest-}study.jsonl --depth 3 --loss force_mae \
        --rates "$results/muon/rates.jsonl" --out "$results/muon/report.html" --figures "$results/muon/figures"
      ;;
    *) echo "scaling_study.sh: no part '$part'; there are $parts" >&2 && exit 2 ;;
  esac
done
