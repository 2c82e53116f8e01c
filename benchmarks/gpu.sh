#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: the kernels' tests on the device, then the measurements.
#   benchmarks/gpu.sh [FOLDER]
# Results go to benchmarks/results/*_cuda.*, and are copied to FOLDER where one is named. A part that fails does not
# stop the others; the exit code is that of the first that did.
set -uo pipefail
cd "$(dirname "$0")/.."
PY="${PYTHON:-python3}"
out="${1:-}"
failed=0
part() {
    echo "== $*"
    "$@" || { code=$?; echo "== failed ($code): $*"; [ "$failed" -ne 0 ] || failed=$code; }
}
"$PY" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "error: torch sees no GPU here" >&2; exit 2; }
part "$PY" -m pytest -q -p no:cacheprovider tests/gsa/kernels/test_triton.py tests/gsa/kernels/test_choice.py
part "$PY" -m benchmarks.kernels --device cuda --backend triton --dtype bfloat16 --lengths 2048 8192 32768
part "$PY" -m benchmarks.attention --device cuda --backend triton --dtype bfloat16 --lengths 2048 8192 32768 131072
part "$PY" -m benchmarks.step --micro_batch_size 2
if [ -n "$out" ]; then mkdir -p "$out" && cp benchmarks/results/*_cuda.* "$out"/; fi
exit "$failed"
