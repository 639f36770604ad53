#!/usr/bin/env bash
# What a GPU shows: real engines built, judged, sealed, loaded again, timed, and broken on purpose.
#
#   docs/evidence/gpu.sh OUT [STAGE ...]
#
# Stages, in their order; left out: all of them.
#   doctor    what is installed and usable
#   tests     pytest -m gpu, with either Python (nms: of them, suppression inside the engine alone)
#   record    references and graphs, by the Python with PyTorch
#   torch     examples/resnet50 by PyTorch and ONNX Runtime on the GPU
#   digits    examples/digits as TensorRT engines: checked, sealed, verified, and again in a new process
#   resnet    examples/resnet50 as TensorRT engines, its baselines accepted, and again against them
#   faults    INT8 calibrated on the wrong scale; plans of another version, truncated, with a flipped byte
#   sessions  pytest -m gpu of the runners' regions and of sessions; suppression inside the engine
#   ab        the A/B rule on ResNet-50: an engine against itself, and a slowed copy against it, 20 times each; one GPU each
#   measure   GPU compute time at batch 1, 8, 32, beside a bare CUDA-event loop; what comparing costs
#   write     OUT/evidence.md from all of it
#
# TORCH_PYTHON has PyTorch for CUDA (and onnxruntime-gpu, for its engines); TRT_PYTHON has TensorRT 8.6 or 10. They may
# be one and the same. DIGITS_RECORDING is a folder made by `gate record` for the digits example on a machine that has
# Model Optimizer; left out: recorded here.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$(realpath -m "${1:?usage: gpu.sh OUT [STAGE ...]}")
shift
[ $# -gt 0 ] || set -- doctor tests record torch digits resnet faults measure write
torch_python=${TORCH_PYTHON:-python3}
trt_python=${TRT_PYTHON:-$torch_python}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# TRT_ENV is sourced for TensorRT's Python alone: its libraries may be others than PyTorch's.
with_torch() { "$torch_python" "$@"; }
with_trt() { (
  [ -z "${TRT_ENV:-}" ] || source "$TRT_ENV"
  exec "$trt_python" "$@"
); }
# check NAME PYTHON SPEC [OPTION ...]: the screen to NAME.txt, the report to NAME/.
check() {
  local name=$1 python=$2 spec=$3
  shift 3
  "$python" -m gate check "$spec" --cache "$out/cache" --baselines "$out/baselines" --report "$out/$name" --verbose \
    "$@" >"$out/$name.txt" 2>"$out/$name.err"
  echo "exit $?" >>"$out/$name.txt"
  echo "--- $name"
  head -12 "$out/$name.txt"
  tail -1 "$out/$name.txt"
  tail -3 "$out/$name.err"
}

digits_recording() {
  if [ -n "${DIGITS_RECORDING:-}" ]; then echo "$DIGITS_RECORDING/$1"; else echo "$out/recordings/$1"; fi
}

doctor() {
  with_torch -m gate doctor | tee "$out/doctor-torch.txt"
  with_trt -m gate doctor | tee "$out/doctor-tensorrt.txt"
}

tests() {
  with_torch -m pytest -m gpu -q -p no:cacheprovider tests/engines/test_onnxruntime_gpu.py tests/engines/torch \
    tests/test_compare_on_device.py tests/steps 2>&1 |
    tee "$out/tests-torch.txt" | tail -15
  with_trt -m pytest -m gpu -q -p no:cacheprovider tests/engines/tensorrt tests/cli/test_inspect.py 2>&1 |
    tee "$out/tests-tensorrt.txt" | tail -25
  nms
}

nms() {
  with_trt -m pytest -m gpu -q -p no:cacheprovider tests/lower/test_nms.py 2>&1 | tee "$out/tests-nms.txt" | tail -25
}

record() {
  if [ -z "${DIGITS_RECORDING:-}" ]; then
    for name in tensorrt weak; do
      with_torch -m gate record "examples/digits/$name.gate.toml" --cache "$out/cache" -o "$out/recordings/$name"
    done
  fi
  with_torch -m gate record examples/resnet50/tensorrt.gate.toml --cache "$out/cache" -o "$out/recordings/resnet50"
}

torch() {
  check torch with_torch examples/resnet50/pytorch.gate.toml --seal "$out/dist"
}

digits() {
  for name in tensorrt weak; do
    check "digits-$name" with_trt "examples/digits/$name.gate.toml" --seal "$out/dist" \
      --reference "$(digits_recording $name)"
    check "digits-$name-again" with_trt "examples/digits/$name.gate.toml" --reference "$(digits_recording $name)"
  done
  for bundle in "$out"/dist/digits-cnn/*; do
    with_trt -m gate verify "$bundle" --require-evidence device
  done >"$out/digits-verify.txt" 2>&1
  grep -E "^(INTACT|REFUSED)" "$out/digits-verify.txt"
}

resnet() {
  local spec=examples/resnet50/tensorrt.gate.toml
  cp -r baselines "$out/" 2>/dev/null
  rm -rf "$out/baselines/resnet50-seeded"
  check resnet-first with_trt "$spec" --reference "$out/recordings/resnet50"
  with_trt -m gate baseline accept "$out/resnet-first" --baselines "$out/baselines" \
    --by "trt-gate maintainers" --reason "first measurement on this GPU"
  check resnet with_trt "$spec" --reference "$out/recordings/resnet50" --seal "$out/dist"
  for bundle in "$out"/dist/resnet50-seeded/trt-*; do
    with_trt -m gate verify "$bundle" --require-evidence device | tail -1
  done | tee "$out/resnet-verify.txt"
  sed 's/^optional .*/&\nrebuilds  = 3/' examples/resnet50/tensorrt.gate.toml >examples/resnet50/rebuilt.toml
  check resnet-rebuilt with_trt examples/resnet50/rebuilt.toml --reference "$out/recordings/resnet50" --engine trt-fp16
  rm examples/resnet50/rebuilt.toml
}

faults() {
  local spec=examples/resnet50/wrong-scale.toml
  sed 's/data:calibration"/data:calibration_of_the_wrong_scale"/' examples/resnet50/tensorrt.gate.toml >"$spec"
  check wrong-scale with_trt "$spec" --reference "$out/recordings/resnet50" --engine trt-int8
  rm "$spec"
  with_trt docs/evidence/broken_plans.py "$out" 2>&1 | tee "$out/broken-plans.txt"
}

measure() {
  local spec name
  for spec in tensorrt pytorch; do
    for name in $(sed -n 's/^name *= *"\(.*\)"/\1/p' "examples/resnet50/$spec.gate.toml"); do
      if [ $spec = tensorrt ]; then
        with_trt docs/evidence/measure.py examples/resnet50/$spec.gate.toml "$out" --engine "$name" \
          --reference "$out/recordings/resnet50"
      else
        with_torch docs/evidence/measure.py examples/resnet50/$spec.gate.toml "$out" --engine "$name"
      fi 2>"$out/measure-$name.err" || tail -5 "$out/measure-$name.err"
    done
  done | tee "$out/measure.txt"
}

sessions() {
  with_torch -m pytest -m gpu -q -p no:cacheprovider tests/engines/test_onnxruntime_gpu.py \
    tests/engines/torch/test_engine.py tests/engines/torch/test_backend.py tests/sessions tests/test_device.py 2>&1 |
    tee "$out/tests-sessions-torch.txt" | tail -25
  with_trt -m pytest -m gpu -q -p no:cacheprovider tests/engines/tensorrt/test_runner.py \
    tests/engines/tensorrt/test_memory.py tests/sessions/test_telemetry.py 2>&1 |
    tee "$out/tests-sessions-tensorrt.txt" | tail -25
}

# gpu INDEX COMMAND ...: on one GPU of those there are, beside the others where there are several.
gpu() {
  local count
  count=$(nvidia-smi -L | wc -l)
  export CUDA_VISIBLE_DEVICES=$(($1 % count))
  shift
  if [ "$count" -gt 1 ]; then "$@" & else "$@"; fi
}

ab_of() {
  local python=$1 spec=$2 name=$3 which=$4 reference=()
  shift 4
  [ "$python" = with_trt ] && reference=(--reference "$out/recordings/resnet50")
  "$python" docs/evidence/latency_ab.py "examples/resnet50/$spec.gate.toml" "$out/ab-$name-$which" --engine "$name" \
    --which "$which" --batch 8 --timed gpu_compute "${reference[@]}" "$@" >"$out/ab-$name-$which.txt" \
    2>"$out/ab-$name-$which.err"
  tail -3 "$out/ab-$name-$which.txt" "$out/ab-$name-$which.err"
}

ab() {
  [ -d "$out/recordings/resnet50" ] ||
    with_torch -m gate record examples/resnet50/tensorrt.gate.toml --cache "$out/cache" -o "$out/recordings/resnet50"
  gpu 0 ab_of with_trt tensorrt trt-fp16 same
  gpu 1 ab_of with_trt tensorrt trt-fp16 slower --width 3000 --close 0.35 --calibration 8
  gpu 2 ab_of with_torch pytorch ort-cuda-tf32 same
  gpu 3 ab_of with_torch pytorch ort-cuda-tf32 slower --width 1260
  wait
  unset CUDA_VISIBLE_DEVICES
}

write() { with_trt docs/evidence/write.py "$out"; }

for stage in "$@"; do
  echo "=== $stage"
  began=$SECONDS
  "$stage"
  echo "=== $stage took $((SECONDS - began)) s"
done
