#!/usr/bin/env bash
# The table of docs/fine-tuning.md: fine-tuned against trained from nothing, with as many steps of one model each.
#   bash examples/fine_tune.sh FOLDER [OVERRIDES...]     FOLDER holds Ge_training.json, ..., Si_test.json (mlearn)
# SEEDS="0 1 2" chooses which training structures are taken, and the order in which they come.
set -euo pipefail
folder=$(cd "${1:?give the folder with Ge_training.json, Li_training.json, Mo_training.json, Si_training.json, Si_test.json}" && pwd)
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh"
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
out=runs/fine_tune data=runs/data archive=examples/data/three-sources.tar.xz
common=(--loss.energy mse --loss.forces mse --loss.energy_weight 10 --loss.force_weight 1 --train.device cpu --optim.rule adamw)
short=(--train.num_steps 400 --optim.warmup_steps 20 --train.validate_every 100 --train.checkpoint_every 400)

# A trained potential of other elements, and one of another level of theory with fewer elements.
[ -f "$data/mlearn-others/header.json" ] || megagnn prepare "$folder"/{Ge,Li,Mo}_training.json \
  --source mlearn --level PBE --group-by frame --split 0.9,0.1,0 --out "$data/mlearn-others"
[ -f "$data/mlearn-Si/header.json" ] || megagnn prepare "$folder/Si_training.json" --test "$folder/Si_test.json" \
  --source Si --level PBE --group-by frame --split 0.9,0.1,0 --out "$data/mlearn-Si"
for source in molecules-gfn2 molecules-gfn1; do
  [ -f "$data/$source/header.json" ] || python tools/source_store.py "$archive" "$source" "$data/$source"
done
[ -d "$out/others/checkpoints/best" ] || megagnn train examples/configs/mlearn-egnn.toml --data.paths "$data/mlearn-others" \
  --out_dir "$out/others" "${common[@]}" --optim.learning_rate 4e-3 --train.num_steps 5000 --train.validate_every 500 --overwrite
[ -d "$out/gfn2/checkpoints/best" ] || megagnn train examples/configs/quickstart-egnn.toml \
  --data.paths "$data/molecules-gfn2" --out_dir "$out/gfn2" "${common[@]}" --optim.learning_rate 6e-3 --optim.ema_decay 0.995 \
  --train.num_steps 3000 --train.validate_every 500 --overwrite

# compare CONFIG BASE DATA STRUCTURES RATE SEED [OPTIONS]: the same data, model, loss and number of steps
compare() {
  local config=$1 base=$2 store=$3 few=$4 rate=$5 seed=$6
  shift 6
  local name="$out/$(basename "$store")-$few-$seed"
  local same=(--data.paths "$store" --data.num_structures "$few" --data.subset_seed "$seed" --train.seed "$seed"
    "${common[@]}" "${short[@]}" --optim.ema_decay 0.995 --overwrite)
  megagnn train "$config" --out_dir "$name-tuned" --init_from "$base" "${same[@]}" --optim.learning_rate 1e-3 "$@"
  megagnn train "$config" --out_dir "$name-anew" "${same[@]}" --optim.learning_rate "$rate"
  for arm in tuned anew; do
    megagnn evaluate "$name-$arm/checkpoints/best.safetensors" "$store" --json "$name-$arm.json"
  done
}
for seed in ${SEEDS:-0 1 2}; do
  for few in 10 30 100; do
    compare examples/configs/mlearn-egnn.toml "$out/others/checkpoints/best" "$data/mlearn-Si" "$few" 4e-3 "$seed" \
      --init.new_elements Si=Ge "${@}"
  done
  compare examples/configs/quickstart-egnn.toml "$out/gfn2/checkpoints/best" "$data/molecules-gfn1" 100 6e-3 "$seed" "${@}"
done
