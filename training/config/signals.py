"""The signals by which a scheduler or a person stops a process of this project."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""A training run saves a checkpoint and ends; every other command that waits for processes ends them.

A closed terminal (SIGHUP) is not among them: a run goes on without it.
"""
