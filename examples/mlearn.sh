#!/usr/bin/env bash
# Real density-functional labels: trains one model for each element of the mlearn set (Zuo et al., J. Phys. Chem. A 2020)
# and evaluates it on the set's own test frames.
#   bash examples/mlearn.sh FOLDER [ELEMENT...]     FOLDER holds Si_training.json, Si_test.json, ...
set -euo pipefail
folder=$(cd "${1:?give the folder with Si_training.json, Si_test.json, ...}" && pwd)
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh"
cd "$root"
ranks=${RANKS:-1}
elements=("$@")
[ ${#elements[@]} -gt 0 ] || elements=(Si Ge Mo Li)

for element in "${elements[@]}"; do
  data=runs/data/mlearn-$element run=runs/mlearn-$element
  # The published split is by frame, so validation is cut by frame, too.
  [ -f "$data/header.json" ] || megagnn prepare "$folder/${element}_training.json" \
    --test "$folder/${element}_test.json" --source "$element" --level PBE --group-by frame --split 0.9,0.1,0 --out "$data"
  python -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m megagnn \
    train examples/configs/mlearn.toml --data.paths "$data" --out_dir "$run" --overwrite
  megagnn evaluate "$run/checkpoints/best.safetensors" "$data" --json "$run/metrics.json"
done
