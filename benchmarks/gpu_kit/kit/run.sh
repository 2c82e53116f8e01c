#!/usr/bin/env bash
# On the GPU machine, from an unpacked project:  KIT=<folder of this file> OUT=<folder> bash run.sh [--smoke] PART ...
# Parts, each with a time limit; a part that fails or exceeds its limit does not stop the next one:
#   ahead    compiles the Triton kernels in parallel, into $TRITON_CACHE_DIR             (10-20 s)
#   check    one line for each thing that the trainer relies on                         (30-60 s)
#   train    training/train.py, the 512M configuration: 12 steps, a save at 8, resume from it, receipt (~150 s)
#   profile  device time of a micro-batch by kernel: GSA, dense on FA2, cuDNN, our own kernel  (~80 s)
#   table    operations from 2K to 128K beside torch's dense kernels; tiles swept; heads; AdamW (~150 s)
#   runs     benchmarks.gpu_run: tuned, flash, dense, 15 s each                          (~150 s)
#   tests    the kernels' tests on the device, 8 processes                               (~90 s)
#   compiled profile of the trainer's torch.compile                                      (~60 s)
set -uo pipefail
KIT="${KIT:-$(cd "$(dirname "$0")" && pwd)}"
TEMPORARY="$(dirname "$(mktemp -u)")"  # $TMPDIR where that is set
OUT="${OUT:-$TEMPORARY/out}"; mkdir -p "$OUT"
PY="${PYTHON:-python3}"
SMOKE=""; if [ "${1:-}" = --smoke ]; then SMOKE=--smoke; shift; fi
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$TEMPORARY/tc}" PYTHONUNBUFFERED=1 NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}"
export PYTHONPATH="$PWD:${SITE:-$TEMPORARY/site}${PYTHONPATH:+:$PYTHONPATH}" COMMIT="${COMMIT:-$(cat COMMIT 2>/dev/null || echo unknown)}"
began=$SECONDS
part() {  # part NAME LIMIT COMMAND...
    local name=$1 limit=$2 at=$SECONDS; shift 2
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1; local code=$?
    echo "=== $name: exit $code, $((SECONDS - at)) s (total $((SECONDS - began)) s)"
}
train() {
    # in memory if 40 GiB are free there, since the disk is not to be measured; $RUN_FOLDER overrides this
    local where="$TEMPORARY/run"; [ "$(df --output=avail -BG /dev/shm | tail -1 | tr -dc 0-9)" -ge 40 ] && where=/dev/shm/run
    where="${RUN_FOLDER:-$where}"
    rm -rf "$where"; mkdir -p "$where"
    local vocab=151936 window=2048 count=4096 tiny=()
    if [ -n "$SMOKE" ]; then
        vocab=512 window=64 count=512
        tiny=(model.d_model=64 model.n_layers=2 model.n_heads=4 model.n_kv_heads=2 model.d_ffn=128 model.vocab_size=512 model.d_indexer=16
              model.k_base=16 model.k_min=4 model.k_max=32 training.max_seq_len=64)
    fi
    "$PY" -c "import numpy as np; from pathlib import Path; from benchmarks.synthetic import write_dataset as w
w(Path('$where/data'), np.full($count, $window), vocab_size=$vocab)" || return 1
    local given=(--config training/configs/pretrain_512m_low_memory.yaml --deepspeed_config ds_configs/zero2.json --output_dir "$where/a"
        data.data_dir="$where/data" training.global_batch_size=64 logging.wandb=false training.eval_interval=0 training.eval_windows=16
        training.indexer_warmup_steps=1 training.save_interval=8 training.stop_at_step=12 training.probe_interval=6 training.health_interval=6
        training.keep_last=3 "${tiny[@]}")
    "$PY" training/train.py "${given[@]}"; echo "first run: exit $?"
    "$PY" training/train.py "${given[@]}" --resume_from step_8; echo "resumed run: exit $?"
    "$PY" "$KIT/summary.py" "$where/a" | tee "$OUT/train.txt"
    "$PY" -m training.doctor "$where/a" || true
    cp "$where/a/metrics.jsonl" "$OUT/metrics.jsonl" 2>/dev/null || true
    rm -rf "$where"
}
for p in "$@"; do
    case "$p" in
    ahead) part ahead 90 "$PY" "$KIT/ahead.py" --jobs "${JOBS:-12}"; tail -3 "$OUT/ahead.log" ;;
    check) part check 120 "$PY" "$KIT/check.py" $SMOKE; grep -E "^(ok|FAILED|check)" "$OUT/check.log" | cut -c1-1200 ;;
    train) export -f train; export PY KIT OUT SMOKE TEMPORARY; part train 240 bash -c train; grep -E "exit|Error|error|receipt" "$OUT/train.log" | tail -12; grep -E "^(median|\{)" "$OUT/train.txt" 2>/dev/null | cut -c1-400 ;;
    profile) part profile 170 "$PY" "$KIT/profile_step.py" --out "$OUT" $SMOKE; grep -vE "^        " "$OUT/profile.txt" | cut -c1-240 ;;
    compiled) mkdir -p "$OUT/c"; part compiled 150 "$PY" "$KIT/profile_step.py" --ways gsa compiled --out "$OUT/c" $SMOKE; grep -E "^(gsa|compiled)" "$OUT/c/profile.txt" ;;
    table) part table 220 "$PY" "$KIT/kernels_table.py" --out "$OUT" $SMOKE; cut -c1-170 "$OUT/kernels.txt" ;;
    runs) part runs 240 "$PY" -m benchmarks.gpu_run $SMOKE --runs tuned flash dense --seconds 15; grep -E "^\||^error" "$OUT/runs.log"; cp benchmarks/results/run_cuda.md "$OUT"/ 2>/dev/null ;;
    tests) files=(test_triton test_triton_identities test_triton_loss test_silu_product test_choice)
        [ -z "$SMOKE" ] || files=(test_choice)  # the others need a GPU, or an older numpy for Triton's interpreter
        part tests 200 "$PY" -m pytest -q -p no:cacheprovider -n "${TESTS_N:-8}" --dist load $(printf "tests/gsa/kernels/%s.py " "${files[@]}") --rootdir "$PWD"; grep -E "FAILED|ERROR|passed|failed" "$OUT/tests.log" | tail -25 ;;
    *) echo "no part $p"; exit 2 ;;
    esac
done
# few files come back: one archive for the logs
(cd "$OUT" && tar czf logs.tgz --exclude=logs.tgz ./*.log ./*.txt ./*.json ./*.jsonl ./c 2>/dev/null; rm -f ./*.log; rm -rf c)
echo "total $((SECONDS - began)) s"
