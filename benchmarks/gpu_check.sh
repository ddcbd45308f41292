#!/usr/bin/env bash
# benchmarks/gpu_check.sh OUT: everything that a GPU can say of this project, in one command.
#
# Builds the native module for the GPU found, runs the tests that need one, then the benchmark of single linears; what is
# printed goes into OUT/log.txt, numbers into OUT/*.csv. What is needed: torch with CUDA, nvcc 13 and a C++ compiler,
# setuptools, pybind11, pytest, and diffusers for whole models. PYTHON names the interpreter.
# A later step runs also where an earlier one failed; the exit status says whether all succeeded.
set -uo pipefail
out=${1:?"usage: benchmarks/gpu_check.sh OUT"}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=0

step() {  # step NAME COMMAND …: runs it, tells how long it took and how it ended
  local name=$1 begin=$SECONDS
  shift
  echo "== $name: $*"
  "$@" 2>&1
  local rc=$?
  echo "== $name: $((SECONDS - begin)) s, exit status $rc"
  [ $rc -eq 0 ] || failed=1
}

check() {
  local target
  target=$("$python" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))') ||
    { echo "no GPU that torch can use"; failed=1; return; }
  case $target in 90 | 10? | 12?) target=${target}a ;; esac
  export NUNCHAKU_PY_CUDA=1 NUNCHAKU_PY_CUDA_TARGETS=$target
  step build "$python" setup.py -q build_ext --inplace
  step info "$python" -m nunchaku_py info
  step tests "$python" -m pytest -q -m gpu
  step ops "$python" -m benchmarks.gpu_ops --out "$out/ops.csv"
}

check > >(tee "$out/log.txt")
exit $failed
