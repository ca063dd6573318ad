#!/usr/bin/env bash
# Other programs for interatomic potentials beside megagnn: each trained on the same training, validation and test frames
# of a store, for the same processor time of one thread, and judged by the same errors.
#   bash examples/compare_peers.sh STORE [OPTION...]      options of `python -m tools.peers.compare`, such as --minutes 3 6
# STORE is a prepared data set of one source, as runs/data/mlearn-Si of examples/mlearn.sh. PROGRAMS="mace nequip" chooses.
# Each program gets an environment of its own, once, in runs/peers/environments. Results are lines of JSON: killed or
# interrupted, call it again.
set -euo pipefail
store=$(cd "${1:?give a prepared data set, such as runs/data/mlearn-Si}" && pwd)
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh"
cd "$root"
environments=runs/peers/environments results=runs/peers/$(basename "$store").jsonl
read -ra programs <<<"${PROGRAMS:-megagnn mace nequip schnetpack}"

environment() { # program, its release, and what it requires where its own requirements exclude this torch
  local folder=$environments/$1 release=$2 alone=()
  local pip=("$folder/bin/pip" install -qq --no-input --no-compile --disable-pip-version-check -c tools/constraints-cpu.txt)
  shift 2
  [ ! -f "$folder/complete" ] || return 0
  [ $# -eq 0 ] || alone=(--no-deps)
  echo "making $folder with $release"
  python -m venv --clear "$folder"
  "${pip[@]}" torch "$@"
  "${pip[@]}" ${alone[@]+"${alone[@]}"} "$release"
  touch "$folder/complete"
}

for program in "${programs[@]}"; do
  case $program in
    megagnn) ;;
    mace) environment mace mace-torch==0.3.16 ;;
    nequip) environment nequip nequip==0.19.1 ;;
    schnetpack) environment schnetpack schnetpack==2.1.1 'ase<4' dirsync fasteners h5py hydra-colorlog matscipy numpy \
      pytorch-lightning rich tensorboard tensorboardX torch-ema torchmetrics tqdm ;;
    *) echo "compare_peers.sh: no program '$program'; there are megagnn, mace, nequip, schnetpack" >&2 && exit 2 ;;
  esac
done
python -m tools.peers.compare "$store" --results "$results" --only "${programs[@]}" "$@"
python -m tools.peers.table "$results" --figure "${results%.jsonl}.png"
