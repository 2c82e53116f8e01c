#!/usr/bin/env bash
# What only a GPU can show: the kernels' tests on the device, then the measurements.
#   benchmarks/gpu.sh [--smoke] [PART ...]
# Parts, in this order when none is named; each is made to end within 9 minutes:
#   kernels     tests of the Triton kernels, on the device
#   operations  each kernel alone, and attention beside dense and the naive gather
#   head        the loss head at 8 x 2048 rows
#   step        a step of one process, GSA beside dense
#   train_step  the trainer against a bare loop, and its measuring steps against plain ones; ZeRO 1 and 2 against
#               data-parallel
#   ratio       tuned against untuned, as bare loops in turns
#   run         the 512M configuration by training/train.py: tuned, on dense flash attention, untuned
#   contrasts   the same: untuned on the naive layer, dense on the trainer's own kernel
#   variants    the same: recomputed, compiled
# `run`, `contrasts` and `variants` add to one table, at the same commit on the same kind of GPU.
# A part that fails does not stop the others; the exit code is that of the first failure. Results go to
# benchmarks/results/*_cuda*, and are copied to the folder $OUT where that is set. --smoke: what can run without a GPU,
# on tiny sizes, to see that it runs.
# Where a GPU is lent for minutes and has no network, use benchmarks/gpu_kit: it packs what is missing, and first checks
# in a minute whether everything that the trainer relies on works.
#
# $PYTHON is what runs (default: python3). Packages that it lacks may come as wheels in the folder $WHEELS: they are
# installed into a folder of their own, without a network, and put before what is there. Collect them where a network is;
# for a machine with Python 3.12 on x86-64 that has torch, triton, numpy and tokenizers, what is mostly missing is
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
#       -d wheels omegaconf hjson annotated-types typing-inspection pydantic==2.14.4 pydantic-core==2.50.5
#   pip wheel --no-deps --no-build-isolation -w wheels deepspeed==0.19.8    # only its source is published; needs torch
# pydantic asks for one version of pydantic-core. What else a machine lacks, the first run says by an ImportError.
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
    *) echo "error: no part is called $part; there are: ${every[*]}" >&2; exit 2 ;;
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
        echo "error: torch sees no GPU here; --smoke runs what needs none" >&2
        exit 2
    }
fi

for part in "${@:-${every[@]}}"; do $how "$part"; done
if [ -n "${OUT:-}" ]; then
    for found in benchmarks/results/*_cuda*; do [ ! -e "$found" ] || { mkdir -p "$OUT" && cp "$found" "$OUT"/; }; done
fi
exit "$failed"
