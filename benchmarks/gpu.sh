#!/usr/bin/env bash
# Runs everything that needs a GPU: the kernels' tests on the device, then the measurements.
#   benchmarks/gpu.sh [--smoke] [PART ...]
# All parts run, in this order, unless some are named; each is sized to end within 9 minutes:
#   kernels     tests of the Triton kernels on the device
#   operations  each kernel alone; GSA's attention against dense attention and the naive gather
#   head        the loss head at 8 x 2048 rows
#   step        a training step of one process, GSA against dense attention
#   train_step  the trainer against a bare loop, its measuring steps against plain steps, ZeRO 1 and 2 against
#               data-parallel training
#   ratio       the tuned against the untuned configuration, as bare loops that take turns
#   run         the 512M configuration with training/train.py: tuned, dense on flash attention, untuned
#   contrasts   the same: untuned on the naive layer, dense on the trainer's own kernel
#   variants    the same: with activation checkpointing, with torch.compile
# `run`, `contrasts` and `variants` write into one table when commit and kind of GPU are the same.
# A part that fails does not stop the others; the exit code is that of the first failure. Results are written to
# benchmarks/results/*_cuda*, and copied to the folder $OUT if that is set. --smoke runs what needs no GPU, on tiny
# sizes, to see that it runs.
# For a GPU that is lent for minutes and has no network, use benchmarks/gpu_kit: it packs what is missing, and first
# checks within a minute whether everything that the trainer relies on works.
#
# $PYTHON is the interpreter (default: python3). Packages that it lacks can be given as wheels in the folder $WHEELS:
# they are installed into a temporary folder without a network, and take precedence over installed ones. Collect them on
# a machine with a network; for Python 3.12 on x86-64 with torch, triton, numpy and tokenizers, this is usually missing:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#       -d wheels omegaconf hjson annotated-types typing-inspection pydantic==2.14.4 pydantic-core==2.50.5
#   pip wheel --no-deps --no-build-isolation -w wheels deepspeed==0.19.8    # only its source is published; needs torch
# pydantic requires one exact version of pydantic-core. An ImportError of the first run names what else is missing.
set -uo pipefail
cd "$(dirname "$0")/.."
PY="${PYTHON:-python3}"
every=(kernels operations head step train_step ratio run contrasts variants)
failed=0

try() {
    echo "== $*" >&2
    "$@" || { code=$?; echo "== failed ($code): $*" >&2; [ "$failed" -ne 0 ] || failed=$code; }
}

on_gpu() {
    case "$1" in
    kernels)
        try "$PY" -m pytest -q -p no:cacheprovider tests/gsa/kernels/test_triton.py \
            tests/gsa/kernels/test_triton_identities.py tests/gsa/kernels/test_triton_loss.py \
            tests/gsa/kernels/test_silu_product.py tests/gsa/kernels/test_choice.py ;;
    operations)
        try "$PY" -m benchmarks.kernels --device cuda --backend triton --dtype bfloat16 --lengths 2048 8192 32768
        try "$PY" -m benchmarks.attention --device cuda --backend triton --dtype bfloat16 \
            --lengths 2048 8192 32768 131072 ;;
    head) try "$PY" -m benchmarks.head --device cuda --dtype bfloat16 --rows 16384 ;;
    step) try "$PY" -m benchmarks.step --micro_batch_size 2 ;;
    train_step) try "$PY" -m benchmarks.train_step --ranks 1 --parts overhead watching zero ;;
    ratio) try "$PY" -m benchmarks.train_step --ranks 1 --parts tuned --rounds 6 ;;
    run) try "$PY" -m benchmarks.gpu_run --runs tuned flash untuned ;;
    contrasts) try "$PY" -m benchmarks.gpu_run --runs naive dense ;;
    variants) try "$PY" -m benchmarks.gpu_run --runs recomputed compiled ;;
    esac
}

on_cpu() {
    case "$1" in
    kernels) try "$PY" -m pytest -q -p no:cacheprovider tests/gsa/kernels/test_choice.py ;;
    head | operations | step | train_step | ratio) try "$PY" -m "benchmarks.$(module "$1")" --help >/dev/null ;;
    run) try "$PY" -m benchmarks.gpu_run --smoke --runs tuned flash untuned ;;
    contrasts) try "$PY" -m benchmarks.gpu_run --smoke --runs naive dense ;;
    variants) try "$PY" -m benchmarks.gpu_run --smoke --runs recomputed compiled ;;
    esac
}

module() {
    case "$1" in
    operations) echo kernels ;;
    ratio) echo train_step ;;
    *) echo "$1" ;;
    esac
}

how=on_gpu
if [ "${1:-}" = --smoke ]; then how=on_cpu; shift; fi
for part in "$@"; do
    case " ${every[*]} " in
    *" $part "*) ;;
    *) echo "error: there is no part $part; choose from: ${every[*]}" >&2; exit 2 ;;
    esac
done

if [ -n "${WHEELS:-}" ]; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$PY" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ $how = on_gpu ]; then
    "$PY" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
        echo "error: torch finds no GPU on this machine; --smoke runs the parts that need none" >&2
        exit 2
    }
fi

for part in "${@:-${every[@]}}"; do $how "$part"; done
if [ -n "${OUT:-}" ]; then
    for found in benchmarks/results/*_cuda*; do [ ! -e "$found" ] || { mkdir -p "$OUT" && cp "$found" "$OUT"/; }; done
fi
exit "$failed"
