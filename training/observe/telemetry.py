"""How well the devices are used: what a step row says beyond losses and phases. Costs no synchronisation of its own."""

from __future__ import annotations

import resource

import psutil
import torch

from gsa.model import flops_per_token
from training.config import BatchPlan, RunConfig
from training.engine.world import World
from training.planning.cost_model import GIB, memory_bytes, setting_of, step_time
from training.planning.devices import Monitor, find, peak_tflops

SETTLED = 3
"""Steps of a process after which memory and pace are those of the run."""


class Telemetry:
    """One per rank; GPUs are sampled on rank 0 alone, those of its node.

    Make it before the model: on a CPU the memory that the process holds by then is not the run's.
    """

    def __init__(self, cfg: RunConfig, plan: BatchPlan, ds_config: dict, world: World) -> None:
        self._cfg, self._plan, self._ds_config, self._world = cfg, plan, ds_config, world
        self._on_gpu = world.device.type == "cuda"
        dtype = torch.bfloat16 if cfg.training.precision == "bf16" else torch.float32
        self._peak_tflops, self._peak_source = peak_tflops(world.device, dtype)
        self._before = psutil.Process().memory_info().rss
        self._own_seconds = 0.0
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

    def shares(self, like: torch.Tensor) -> torch.Tensor:
        """(2, ranks) like `like`, to be summed over ranks: seconds of the step before, and allocator retries since."""
        found = like.new_zeros(2, self._world.size)
        retries = torch.cuda.memory_stats(self._world.device).get("num_alloc_retries", 0) if self._on_gpu else 0
        found[0, self._world.rank].fill_(self._own_seconds)
        found[1, self._world.rank].fill_(retries - self._retries)
        self._retries = retries
        return found

    def of_step(
        self, seconds: float, phases: dict[str, float], shares: torch.Tensor, keys: float, visible: float
    ) -> dict:
        """The row's measures of use. phases: seconds by name; shares: summed over ranks; keys, visible: per query."""
        cfg, plan = self._cfg, self._plan
        self._own_seconds = phases.get("data", 0.0) + phases.get("forward", 0.0)
        tokens = plan.global_batch_size * cfg.training.max_seq_len
        useful = (
            tokens
            * flops_per_token(
                cfg.model,
                cfg.training.max_seq_len,
                indexer_rows=cfg.training.indexer_loss_rows,
                keys=keys,
                visible=visible,
            )["total"]
        )
        rank_seconds, retries = shares.cpu()
        row = {
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
        return row | ({} if self._monitor is None else self._monitor.read())

    def messages(self) -> list[str]:
        """What has gone wrong with the sampling of GPUs since the last call."""
        return [] if self._monitor is None else self._monitor.new_messages()

    def peak_bytes(self) -> int:
        """Peak memory of this rank: allocated on its GPU, or resident on the CPU."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated(self._world.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def run_bytes(self) -> int:
        """Peak memory of this run: allocated on its GPU; on a CPU what the process has grown by since this was made.

        A process reuses freed pages and counts resident ones in batches: a model of a MiB or so may have 0.
        """
        return max(0, self.peak_bytes() - (0 if self._on_gpu else self._before))

    def predicted(self, seconds: float, backend: str) -> dict:
        """The "predicted" event: by count, beside what this process has measured. seconds: of a settled step.

        Seconds are predicted of Triton's kernels on a device in the table.
        """
        cfg = self._cfg
        setting = setting_of(cfg, self._ds_config, self._plan)
        T, rows = cfg.training.max_seq_len, cfg.training.indexer_loss_rows
        bf16 = cfg.training.precision == "bf16"
        counted = memory_bytes(cfg.model, T, setting, bf16=bf16, rows=rows, fused=self._on_gpu)
        known = find(torch.cuda.get_device_name(self._world.device)) if self._on_gpu else None
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
