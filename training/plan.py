"""Predicts memory and time of a run before a GPU is rented, and ranks the ways to run its global batch.

    python -m training.plan --config training/configs/pretrain_512m_low_memory.yaml --num_gpus 4 --gpu L40S

It needs no GPU. Parameters, memory by part and arithmetic are counted (benchmarks/memory.py checks the memory). Seconds
per step are predicted from shares of the device's peaks that are assumed, and printed with the prediction. The ranking
covers ZeRO stages, micro-batch sizes and activation checkpointing. Exit codes: 0 planned; 1 nothing fits; 2 refused
argument or configuration, or nothing to --write since nothing fits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from training.config import ConfigError, load_config, plan_batch
from training.config.command import command_parser, run_command
from training.config.exit_codes import ExitCode
from training.planning.devices import parse_device
from training.planning.options import DS_CONFIGS, Request, ds_config_for, ranked
from training.planning.plan_report import as_json, report, write_run


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("plan", __doc__)
    parser.add_argument("--config", type=Path, required=True, help="the run's yaml")
    parser.add_argument(
        "--deepspeed_config", type=Path, help="a file of ds_configs/ (default: ZeRO 2 for this GPU's link)"
    )
    parser.add_argument("--num_gpus", type=int, default=4, help="number of GPUs (default: %(default)s)")
    parser.add_argument("--gpus", dest="num_gpus", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--gpu",
        default="A40",
        metavar="NAME|GiB,TFLOPs,GB/s",
        help="A40, L40S, A100-80, H100, H200, ..., or its memory, peak and bandwidth to other GPUs "
        "(default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the recommended yaml and DeepSpeed json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, over the yaml")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.num_gpus < 1:
        raise ConfigError(f"--num_gpus {args.num_gpus} must be at least 1")
    device = parse_device(args.gpu)
    cfg = load_config(args.config, args.overrides)
    file = args.deepspeed_config or DS_CONFIGS / ds_config_for(2, False, args.num_gpus, device)
    request = Request(cfg, args.config, plan_batch(cfg.training, args.num_gpus), device, file)
    given = request.option(request.setting(file))
    options = ranked(request)
    written = write_run(request, options[0], args.write) if args.write else ()
    if args.json:
        print(json.dumps(as_json(request, given, options), indent=1))
    else:
        print(report(request, given, options))
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    return ExitCode.FINISHED if options[0].fits(device) else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(run_command(main))
