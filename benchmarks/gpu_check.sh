#!/usr/bin/env bash
# benchmarks/gpu_check.sh OUT [STEP …]: everything that a GPU can say of this project, in one command.
#
#   build      the native module, for the GPU found
#   info       what it finds
#   tests      those that need a GPU, without Triton's
#   triton     those of the Triton kernels
#   tune       the Triton kernels' configurations, measured  OUT/tuned.json
#   attention  8-bit attention beside torch's                OUT/attention.csv
#   ops        benchmark of single linears, and its bars     OUT/ops.csv
#   lora       what adapters cost a linear                   OUT/lora.csv
#   pipeline   benchmark of one step of FLUX.1               OUT/pipeline.csv
#   sdxl       the same of SDXL's UNet                       OUT/sdxl.csv
#   quantize   FLUX.1-dev's size from 24 GB on disk          OUT/quantize.csv
#   bench      nunchaku-py bench of FLUX.1-dev               OUT/bench
#   memcheck   the kernels' tests under compute-sanitizer: accesses out of bounds
#   racecheck  the same: races in shared memory
#
# All of them, in this order, or those named. The limits of all steps are more than ten minutes together; those of each
# of these calls are not, and the later ones use what the first has built and the second has measured:
#
#   benchmarks/gpu_check.sh OUT build info tests memcheck racecheck      whether it is right
#   benchmarks/gpu_check.sh OUT2 triton tune attention ops               Triton's kernels, and how fast linears are
#   benchmarks/gpu_check.sh OUT3 lora pipeline sdxl                      how fast whole models are
#   benchmarks/gpu_check.sh OUT4 quantize                                how fast they are quantized; 31 GB of disk
#   benchmarks/gpu_check.sh OUT5 bench                                   what a user sees of all this
#
# What is printed goes into OUT/log.txt too; its first line names the GPU, the versions and the commit. What is needed:
# torch with CUDA, nvcc 13 and a C++ compiler, setuptools, pybind11, ninja, pytest, and diffusers for whole models;
# torchao, for a contender of pipeline and sdxl that else has rows which say so. PYTHON names the interpreter,
# SECONDS_IN_ALL (default 570) how long all may take: a step is stopped at its own limit or at this one. A later step
# runs also where an earlier one failed; the exit status says whether all that ran succeeded.
set -uo pipefail
ALL="build info tests triton tune attention ops lora pipeline sdxl quantize bench memcheck racecheck"
out=${1:?"usage: benchmarks/gpu_check.sh OUT [STEP …], steps: $ALL"}
shift
steps=${*:-$ALL}
for name in $steps; do
  case " $ALL " in *" $name "*) ;; *) echo "unknown step: $name; steps: $ALL" >&2; exit 2 ;; esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
budget=${SECONDS_IN_ALL:-570}
failed=0

step() {  # step NAME LIMIT COMMAND …: if it was asked for, runs it, tells how long it took and how it ended
  local name=$1 limit=$2 begin=$SECONDS rc
  shift 2
  case " $steps " in *" $name "*) ;; *) return 0 ;; esac
  if [ $((budget - SECONDS)) -lt "$limit" ]; then limit=$((budget - SECONDS)); fi
  if [ "$limit" -le 0 ]; then
    echo "== $name: not run, the $budget s of all steps are over"
    failed=1
    return
  fi
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=5 "$limit" "$@"
  rc=$?
  echo "== $name: $((SECONDS - begin)) s, exit status $rc$([ $rc -ne 124 ] || echo ', stopped at its limit')"
  [ $rc -eq 0 ] || failed=1
}

sanitizer() {  # where compute-sanitizer is; nothing if it is nowhere
  local folder
  command -v compute-sanitizer && return
  for folder in ${CUDA_HOME:+"$CUDA_HOME/bin"} /usr/local/cuda/bin; do
    [ -x "$folder/compute-sanitizer" ] && echo "$folder/compute-sanitizer" && return
  done
}

# sanitize TOOL LIMIT DESELECTED OPTION …: the kernels' tests under it, without those whose names hold DESELECTED.
# Without torch's cache of memory, in which an access out of bounds would hit the neighbour; so nothing can be captured
# in a graph.
sanitize() {
  local tool=$1 limit=$2 deselected=$3 found
  shift 3
  case " $steps " in *" $tool "*) ;; *) return 0 ;; esac
  found=$(sanitizer)
  if [ -z "$found" ]; then
    echo "== $tool: skipped, compute-sanitizer is not installed (PATH, CUDA_HOME/bin, /usr/local/cuda/bin)"
    return
  fi
  step "$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$found" --tool "$tool" --error-exitcode 1 \
    --target-processes all "$@" "$python" -m pytest -q -p no:cacheprovider -m gpu tests/simt -k "not ($deselected)"
}

check() {
  "$python" -W ignore -m benchmarks.gpu || return 1
  export NUNCHAKU_PY_CUDA=1 NUNCHAKU_PY_CUDA_TARGETS=native
  step build 220 "$python" setup.py -q build_ext --inplace
  step info 20 "$python" -m nunchaku_py info
  step tests 130 "$python" -m pytest -q -m gpu --ignore tests/triton
  step triton 180 "$python" -m pytest -q -m gpu tests/triton
  # What each is to have done by itself comes before its limit: a compilation that has begun is finished.
  step tune 120 "$python" -m nunchaku_py tune --rows 4608,4096,512 --seconds 100 --out "$out/tuned.json"
  step attention 110 "$python" -m benchmarks.gpu_attention --out "$out/attention.csv" --seconds 85
  step ops 160 "$python" -m benchmarks.gpu_ops --out "$out/ops.csv" --seconds 130
  step lora 50 "$python" -m benchmarks.lora speed --device cuda --seconds 2 --out "$out/lora.csv"
  step pipeline 210 "$python" -m benchmarks.gpu_pipeline --out "$out/pipeline.csv" \
    --seconds "${PIPELINE_SECONDS:-150}"
  step sdxl 150 "$python" -m benchmarks.gpu_pipeline --model sdxl --out "$out/sdxl.csv" \
    --seconds "${PIPELINE_SECONDS:-100}"
  step quantize 560 "$python" -m benchmarks.flux_quantize --temporary --device cuda --out "$out/quantize.csv"
  step bench 500 "$python" -m nunchaku_py bench flux.1-dev --no-load --rounds 5 --out "$out/bench"
  sanitize memcheck 100 compiled
  # Some fifty times slower: kernels of this project only, and no whole models.
  sanitize racecheck 100 "compiled or whole_model" --kernel-regex kns=nunchaku_py
  return $failed
}

check 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
