#!/usr/bin/env bash
# Sets up the environment and runs every check: lint, format, types, spelling, CUDA compilation, tests.
# Arguments go to pytest: bash tests/run.sh tests/ops -k gather
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/setup_env.sh" test labels || exit 1
cd "$root" || exit 1
# One thread: the tests are small, and ranks outnumber cores. Tests of threading set their own number.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

passed=() failed=()
check() { # name command...
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  if "$@"; then passed+=("$name"); else failed+=("$name"); fi
  echo "   $((SECONDS - start)) s"
}

clang_format() {
  find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs clang-format --dry-run -Werror
}

# The whole library with CUDA kernels, loaded by the torch that is here, with or without a GPU.
cuda_build() {
  local folder status=0
  folder=$(mktemp -d)
  MEGAGNN_CUDA=1 python setup.py --quiet build_ext --build-temp "$folder/temp" --build-lib "$folder/lib" &&
    python - "$folder"/lib/megagnn/_C.*.so <<'PY' || status=1
import importlib.util, sys
import torch

spec = importlib.util.spec_from_file_location("megagnn._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.cuda_archs and torch.ops.megagnn.gather(torch.ones(1), torch.tensor([0, 0]), torch.tensor([0, 2]), None).sum() == 2
print(f"   CUDA kernels for {module.cuda_archs}, loaded by torch {torch.__version__}")
PY
  rm -rf "$folder"
  return $status
}

back_ends() {
  python -W ignore -c '
import torch
from megagnn import ops
from megagnn.ops.backends import installed_backends
print(f"   ops: {ops.backend()} {ops.build_info()}\n   torch {torch.__version__}, CUDA device: {torch.cuda.is_available()}")
tested, missing = installed_backends()
print("   aggregation back ends tested:", ", ".join(tested))
print("   aggregation back ends missing:", *missing.values() or ["none"], sep="\n     ")'
}

run_pytest() {
  local argument
  for argument in "$@"; do # a path replaces the default, so that one file can be run
    if [ -e "${argument%%::*}" ]; then
      python -m pytest "$@"
      return
    fi
  done
  python -m pytest tests "$@"
}

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy megagnn
check "clang-format" clang_format
check "codespell" codespell
if command -v "${NVCC:-nvcc}" >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
  check "CUDA kernels compile and load" cuda_build
else
  echo "== CUDA kernels: not compiled, nvcc was not found"
fi
check "back ends" back_ends
check "pytest" run_pytest "$@"

echo
echo "tests/run.sh: passed: $(IFS=,; echo "${passed[*]}")"
if [ ${#failed[@]} -gt 0 ]; then
  echo "tests/run.sh: FAILED: $(IFS=,; echo "${failed[*]}")"
  exit 1
fi
