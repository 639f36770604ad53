#!/usr/bin/env bash
# The digits example as TensorRT engines on a GPU: check, seal, verify; then a plan with a flipped byte.
#
#   docs/evidence/digits-tensorrt.sh OUT [RECORDING]
#
# Run it from the repository's root with the gate and TensorRT installed for $PYTHON (python3 if not set). A host without
# PyTorch needs a RECORDING, made elsewhere by `gate record examples/digits/tensorrt.gate.toml -o RECORDING`.
set -euo pipefail
out=${1:?usage: digits-tensorrt.sh OUT [RECORDING]}
python=${PYTHON:-python3}
mkdir -p "$out"
options=(--cache "$out/cache" --baselines "$out/baselines" --report "$out/report" --seal "$out/dist" --verbose)
[ $# -lt 2 ] || options+=(--reference "$2")

"$python" -m gate check examples/digits/tensorrt.gate.toml "${options[@]}" 2>"$out/progress.txt" | tee "$out/screen.txt" || true
for bundle in "$out"/dist/digits-cnn/*; do
  "$python" -m gate verify "$bundle" | tail -1
done

# The same engines again, in a new process, from the cache: nothing is built, the answers are the same.
"$python" -m gate check examples/digits/tensorrt.gate.toml "${options[@]}" 2>/dev/null | grep -E "^reused|exit" || true

# A flipped byte in a sealed plan is refused before anything is deserialised.
plan=$(ls "$out"/dist/digits-cnn/*/artifacts/model.plan | head -1)
chmod u+w "$plan"
printf '\xff' | dd of="$plan" bs=1 seek=1000 conv=notrunc status=none
"$python" -m gate verify "$(dirname "$(dirname "$plan")")" 2>&1 | tail -2 || true
