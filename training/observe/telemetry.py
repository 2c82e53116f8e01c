"""How well the devices are used: pace, MFU, phases and memory of a step. Costs no synchronisation of its own."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from gsa.model import flops_per_token
from gsa.units import GIB
from training.config.run_spec import RunSpec
from training.engine.world import World
from training.observe.gpu_monitor import Monitor
from training.observe.step_clock import StepClock
from training.planning.cost_model import memory_bytes, setting_of, step_time
from training.planning.devices import find_device, peak_tflops

SETTLED = 3
"""Steps after which a process has reached the memory and the pace of the run."""


class Telemetry:
    """One per rank; GPUs are sampled on rank 0 alone, those of its node.

    Make it before the model: on a CPU the memory that the process holds by then is not the run's.
    """

    def __init__(self, spec: RunSpec, world: World) -> None:
        self._spec, self._world = spec, world
        self._on_gpu = world.device.type == "cuda"
        dtype = torch.bfloat16 if spec.cfg.training.precision == "bf16" else torch.float32
        self._peak_tflops, self._peak_source = peak_tflops(world.device, dtype)
        self._before = psutil.Process().memory_info().rss
        self._clock = StepClock(world.device)
        self._own_seconds = 0.0
        self._stalls = {"seconds_save": 0.0, "seconds_eval": 0.0}
        self._retries = 0
        self._monitor = Monitor() if self._on_gpu and world.is_main else None

    def describe(self) -> dict:
        """The "device" event."""
        name, memory = "CPU", psutil.virtual_memory().total
        if self._on_gpu:
            properties = torch.cuda.get_device_properties(self._world.device)
            name, memory = properties.name, properties.total_memory
        return {
            "event": "device",
            "name": name,
            "world_size": self._world.size,
            "memory_gib": memory / GIB,
            "peak_tflops": self._peak_tflops,
            "peak_source": self._peak_source,
        }

    def enter_phase(self, name: str) -> None:
        """A phase of the step begins, and the one before ends."""
        self._clock.lap(name)

    @contextmanager
    def stalled(self, name: str) -> Iterator[None]:
        """Adds the seconds of its block, in which no step runs, to those that the next step's row reports."""
        began = time.perf_counter()
        yield
        self._stalls[name] += time.perf_counter() - began

    def shares(self, like: torch.Tensor) -> torch.Tensor:
        """This rank's part of (2, ranks), zeros elsewhere: seconds of the step before, allocator retries since then.

        The tensor has the dtype and the device of `like`; summed over ranks it is complete.
        """
        found = like.new_zeros(2, self._world.size)
        retries = torch.cuda.memory_stats(self._world.device).get("num_alloc_retries", 0) if self._on_gpu else 0
        found[0, self._world.rank].fill_(self._own_seconds)
        found[1, self._world.rank].fill_(retries - self._retries)
        self._retries = retries
        return found

    def of_step(self, began: float, rank_shares: torch.Tensor, *, selected: float, visible: float) -> dict:
        """The row's measures of time and use; it ends the step's last phase and waits for the device once.

        began: time.perf_counter() when the step did. rank_shares: `shares`, summed over ranks. selected, visible: keys
        per query.
        """
        phases = self._clock.read()
        seconds = time.perf_counter() - began
        cfg, plan = self._spec.cfg, self._spec.plan
        del phases["other"]  # seconds_other holds what the host adds to it as well
        self._own_seconds = phases.get("data", 0.0) + phases.get("forward", 0.0)
        tokens = plan.global_batch_size * cfg.training.max_seq_len
        flops = flops_per_token(
            cfg.model,
            cfg.training.max_seq_len,
            indexer_rows=cfg.training.indexer_loss_rows,
            keys=selected,
            visible=visible,
        )
        useful = tokens * flops["total"]
        rank_seconds, retries = rank_shares.cpu()
        row = {f"seconds_{name}": spent for name, spent in phases.items()} | {
            "tokens_per_s": tokens / seconds,
            "tokens_per_s_per_device": tokens / seconds / plan.world_size,
            "mfu": useful / (seconds * plan.world_size * self._peak_tflops * 1e12),
            "seconds": seconds,
            "seconds_other": max(0.0, seconds - sum(phases.values())),
            "rank_seconds_slowest": rank_seconds.max().item(),
            "rank_seconds_median": rank_seconds.median().item(),
            "memory_gib": self.peak_bytes() / GIB,
        }
        if self._on_gpu:
            row["allocator_retries"] = int(retries.max())
        stalls, self._stalls = self._stalls, dict.fromkeys(self._stalls, 0.0)
        return row | ({} if self._monitor is None else self._monitor.read()) | stalls

    def messages(self) -> list[str]:
        """Errors in sampling the GPUs since the last call."""
        return [] if self._monitor is None else self._monitor.new_messages()

    def peak_bytes(self) -> int:
        """Peak memory of this rank: allocated on its GPU, or resident on the CPU."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated(self._world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def run_bytes(self) -> int:
        """Peak memory of this run: allocated on its GPU; on a CPU, the growth of the process since this was made.

        A process reuses freed pages, and the kernel counts resident ones in batches: a model of about a MiB may show 0.
        """
        return max(0, self.peak_bytes() - (0 if self._on_gpu else self._before))

    def predicted(self, seconds: float, backend: str) -> dict:
        """The "predicted" event: memory and seconds by count, beside what this process has measured.

        seconds: of a step after SETTLED ones. Seconds are predicted for Triton's kernels on a device in the table.
        """
        cfg = self._spec.cfg
        setting = setting_of(cfg, self._spec.ds_config, self._spec.plan)
        T, rows = cfg.training.max_seq_len, cfg.training.indexer_loss_rows
        bf16 = cfg.training.precision == "bf16"
        counted = memory_bytes(cfg.model, T, setting, bf16=bf16, rows=rows, fused=self._on_gpu)
        known = find_device(torch.cuda.get_device_name(self._world.device)) if self._on_gpu else None
        time = None
        if known is not None and backend == "triton":
            time = step_time(cfg.model, T, setting, known, bf16=bf16, rows=rows)
        return {
            "event": "predicted",
            "memory_gib": counted["allocated"] / GIB,
            "measured_gib": self.run_bytes() / GIB,
            "seconds": None if time is None else time.seconds,
            "measured_seconds": seconds,
        }

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
