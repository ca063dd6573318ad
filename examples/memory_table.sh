#!/usr/bin/env bash
# Peak memory and step time of a rank: plain, with recomputation, with ZeRO, and with what else there is, each beside
# plain, and what the peaks are made of. Arguments go to the tool:
#   bash examples/memory_table.sh --ranks 4 --width 512 --layers 6 --edges 40000
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh"
cd "$root"
out=runs/memory-table

# one thread per rank: there are as many ranks as cores on a small machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -W ignore -m tools.bench.memory.table --out "$out" "$@"
echo "memory_table: $out/table.md and $out/memory-table-*.png"
