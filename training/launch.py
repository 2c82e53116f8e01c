"""Starts ranks with the `deepspeed` launcher, sends them signals, and returns their true exit code.

    python -m training.launch --num_gpus 4 training/train.py --config ... --output_dir ...

The launcher alone leaves its ranks running when it receives SIGTERM, and returns 0 when its child is killed. Here
SIGTERM, SIGUSR1, and Ctrl-C or a closed terminal as SIGTERM, go to the ranks themselves, which save at the next step
boundary and exit (a second signal ends them at once). Before there are ranks, a signal ends the launch. No process
outlives this one. Ranks of one host meet at a free port, unless --master_port names one. The exit code is that of the
ranks: as in training/train.py, or 128 + the number of the signal that killed one, or that came before there was one; 2
without arguments.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from training.config.exit_codes import ExitCode
from training.engine.launcher import FORWARDED, Launch, end_session, output_dir, true_code, with_free_port


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):  # everything else is for the launcher, --help of train.py included
        print(f"usage: python -m training.launch [launcher options] training/train.py ...\n\n{__doc__}")
        return ExitCode.FINISHED if argv else ExitCode.REFUSED_CONFIG
    launch = Launch()
    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, launch.forward)
    launch.start([str(Path(sys.executable).with_name("deepspeed")), *with_free_port(argv)])
    code = launch.wait()
    orphans = end_session(launch.session)
    if launch.ended_by and code != 0:
        return 128 + launch.ended_by
    return true_code(code, orphans, output_dir(list(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
