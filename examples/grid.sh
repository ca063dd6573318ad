#!/usr/bin/env bash
# One model over a grid of ranks on this machine: tensor x pipeline x data, here on the embedded data set. Four ranks by
# default. Arguments are configuration overrides:
#   TENSOR=2 PIPELINE=2 DATA=1 bash examples/grid.sh --train.num_steps 100
# On several nodes: TENSOR=2 PIPELINE=2 sbatch examples/slurm/grid.sbatch CONFIG.toml ...
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh"
cd "$root"
tensor=${TENSOR:-2} pipeline=${PIPELINE:-2} data=${DATA:-1}
store=runs/data/three-sources
[ -f "$store/header.json" ] || megagnn prepare examples/data/three-sources.tar.xz --out "$store" >/dev/null

# Twice as many batches to a step as there are stages keep these busy; each batch is so much smaller.
batches=$((2 * pipeline))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m torch.distributed.run --standalone --nproc-per-node $((tensor * pipeline * data)) -m megagnn \
  train examples/configs/quickstart.toml --out_dir runs/grid --overwrite \
  --parallel.tensor "$tensor" --parallel.pipeline "$pipeline" --parallel.data "$data" \
  --model.num_layers $((2 * pipeline)) --optim.accumulate_steps "$batches" \
  --data.max_atoms $((512 / batches)) --data.max_edges $((6000 / batches)) \
  --optim.warmup_steps 5 --train.num_steps 40 --train.validate_every 40 --train.checkpoint_every 20 "$@"
