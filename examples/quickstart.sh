#!/usr/bin/env bash
# From a clone to a trained, tested model: sets up the environment, unpacks the embedded data, trains on two ranks, or
# on as many as there are GPUs, evaluates on held-out molecules and slabs. Run it again to train again. Arguments are
# configuration overrides:
#   bash examples/quickstart.sh --model.width 96 --train.num_steps 4000
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh"
cd "$root"

data=runs/data/three-sources
run=runs/quickstart
for argument in "$@"; do
  case $argument in
    --out_dir* | --data.paths*) echo "quickstart: $argument is fixed here; call megagnn train itself" >&2 && exit 2 ;;
  esac
done
start=$SECONDS
ranks=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')

if ! [ -f "$data/header.json" ]; then
  echo "quickstart: unpacking the embedded data set to $data"
  megagnn prepare examples/data/three-sources.tar.xz --out "$data" >/dev/null
fi

# one thread per rank: there are as many ranks as cores on a small machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
on_ranks() { python -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m megagnn "$@"; }

echo "quickstart: training on $ranks ranks, a few minutes"
on_ranks train examples/configs/quickstart.toml --out_dir "$run" --overwrite "$@"

echo "quickstart: errors on the test split, molecules and slabs that training has not seen"
on_ranks evaluate "$run/checkpoints/best.safetensors" "$data" --json "$run/metrics.json" --plot "$run/parity.png"

# What this model should reach; after overrides it is only reported.
python tools/check_metrics.py "$run/metrics.json" --below 0.13 || [ $# -gt 0 ] || exit 1

activate=""
[ ! -f "$VIRTUAL_ENV/bin/activate" ] || activate=" && source $(printf %q "$VIRTUAL_ENV/bin/activate")"
cat <<TEXT

quickstart: done in $((SECONDS - start)) s. Next:
  cd $(printf %q "$root")$activate
  tensorboard --logdir $run                    curves, at http://localhost:6006
  $run/parity.png                              predictions against labels
  megagnn inspect $run/checkpoints/best.safetensors
  python examples/relax_and_run.py                         the model in ASE: relaxation, dynamics
TEXT
