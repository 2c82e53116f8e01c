"""The only door to DeepSpeed: start, build, step, save, load.

Everything this project knows about DeepSpeed's habits is in this file, so that a new version is one
file's work. Written against deepspeed 0.19.8.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import LossScaler  # noqa: E402
from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402
from deepspeed.utils.tensor_fragment import fragment_address  # noqa: E402

from gsa.checkpoint import safe_load  # noqa: E402
from gsa.checkpoint.full_state import FullState, Layout, family, read_full_state, read_layout  # noqa: E402
from gsa.checkpoint.manifest import CheckpointError  # noqa: E402
from gsa.checkpoint.state import CLIENT_KEY  # noqa: E402
from training.config import TrainingConfig  # noqa: E402
from training.engine.optimizer import group_hyperparameters, schedule_factor  # noqa: E402
from training.engine.reshape import install, zero_padding  # noqa: E402
from training.engine.snapshot import HostBuffers, Snapshot, host_tree  # noqa: E402
from training.engine.world import World, environment_world_size  # noqa: E402
from training.engine.zero_internals import UpdateSample, drop_gradients, gradient_squares  # noqa: E402

DEEPSPEED_GLOBALS = (LossScaler, ZeroStageEnum, fragment_address)
"""The classes inside DeepSpeed's own files; the loader's allow-list for them, and nothing more."""

T = TypeVar("T")

DEEPSPEED_VERSION: str = deepspeed.__version__


def start(timeout_s: float, *, verbose: bool = False) -> World:
    """Joins the process group that `deepspeed` or `torchrun` prepared; alone, makes one of a single rank.

    timeout_s: how long a collective may wait for a late rank before it raises. verbose: DeepSpeed may say what it does.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    size = environment_world_size()
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(size))))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        # On CPU init_distributed compiles an operator (35-60 s) that only inference uses, and it leaves
        # 69 MB per rank in /dev/shm for good. The table is private to DeepSpeed: pinned with its version.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_logger.setLevel(logging.INFO if verbose else logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    # numpy and torch draw nothing during training; seeded all the same, so that nothing can differ by accident
    random.seed(0)
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=timeout_s))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, device)


class _SafeFiles(CheckpointEngine):
    """DeepSpeed's checkpoint files: kept as snapshots for someone else to write, and read without running them."""

    def __init__(self) -> None:
        super().__init__(None)
        self.name = "gsa"
        self.buffers: HostBuffers | None = None
        self.snapshot = Snapshot()

    def create(self, info: Any) -> None:
        self.snapshot = Snapshot()

    def save(self, state_dict: object, path: str) -> None:
        self.snapshot.files[Path(path)] = host_tree(state_dict, os.path.basename(path), self.buffers)

    def load(self, path: str, map_location: object = None) -> object:
        return safe_load.load(path, extra_allowed=DEEPSPEED_GLOBALS)

    def commit(self, info: Any) -> bool:
        return True


def _order_streams_instead_of_syncing(optimizer: Any) -> None:
    """Takes a wait of the host for the device out of every micro-batch of ZeRO 2 with overlap_comm.

    There DeepSpeed lets go of gradients that another stream may still be summing, or hands that stream gradients that
    are still being computed: it is enough that the streams wait for each other. Not where gradients go to the host,
    which reads them there.
    """
    epilogue, accelerator = optimizer.independent_gradient_partition_epilogue, get_accelerator()

    def on_the_device(device_index: int | None = None) -> None:
        computing, reducing = accelerator.current_stream(), optimizer.reduction_stream
        reducing.wait_stream(computing)
        computing.wait_stream(reducing)

    def without_waiting() -> None:
        waits, accelerator.synchronize = accelerator.synchronize, on_the_device
        try:
            epilogue()
        finally:
            accelerator.synchronize = waits

    optimizer.independent_gradient_partition_epilogue = without_waiting


class Engine:
    """A model whose gradients, optimizer and checkpoints DeepSpeed owns.

    ds_config: complete, nothing "auto". The model is built alike on every rank, on the CPU in float32.
    """

    deepspeed_version = DEEPSPEED_VERSION

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        ds_config: Mapping[str, Any],
    ) -> None:
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=schedule, config=dict(ds_config), dist_init_required=False
        )
        self._files = _SafeFiles()
        self._engine.checkpoint_engine = self._files
        # it would put a script that loads pickles unsafely into every run folder
        self._engine._copy_recovery_script = lambda save_path: None
        self.zero_stage: int = int(self._engine.zero_optimization_stage())
        self.device: torch.device = torch.device(self._engine.device)
        self._grad_norm: torch.Tensor | float | None = None
        if self.zero_stage == 2 and not self._engine.optimizer.cpu_offload:
            _order_streams_instead_of_syncing(self._engine.optimizer)
        if self.zero_stage == 3 and not self._engine.optimizer.params_in_nvme_and_cpu:
            zero_padding(self._engine.optimizer)

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradient of `loss` / accumulation steps / ranks: training/loop/step.py says of which loss."""
        self._engine.backward(loss)

    def at_boundary(self) -> bool:
        """Whether the micro-batch whose backward pass is done is the last one of a step."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def step(self, *, drop: bool = False) -> bool:
        """Called once per micro-batch; updates the weights, and returns True, with the last one of a step.

        drop: the step counts, for the schedule too, but its gradient is forgotten and nothing is updated.
        """
        boundary = self.at_boundary()
        if boundary and self.zero_stage == 0:
            # stage 0 reports no norm of its own in float32
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._grad_norm = torch.nn.utils.get_total_norm(gradients)
        if drop and boundary:
            optimizer, self._grad_norm = self._engine.optimizer, 0.0
            step = optimizer.step
            optimizer.step = lambda *args, **kwargs: drop_gradients(optimizer, self.zero_stage)
            try:
                self._engine.step()
            finally:
                optimizer.step = step
            return True
        self._engine.step()
        if boundary and self.zero_stage > 0:
            self._grad_norm = self._engine.get_global_grad_norm()
        return boundary

    def gradient_squares(self) -> torch.Tensor | None:
        """This rank's share of the squared gradient by part. Call it at a boundary, before `step`."""
        return gradient_squares(self.module, self._engine.optimizer, self.zero_stage)

    def update_sample(self) -> UpdateSample:
        """A sample of the masters as they are, to be compared with what `step` makes of them."""
        return UpdateSample(self._engine.optimizer, self.zero_stage)

    def grad_norm(self) -> float:
        """L2 norm of the last step's whole gradient before clipping; nan when it was not finite."""
        return float("nan") if self._grad_norm is None else float(self._grad_norm)

    def param_groups(self) -> list[dict]:
        return self._engine.optimizer.param_groups

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of the next update, by group name."""
        return {group["name"]: float(group["lr"]) for group in self.param_groups()}

    def full_weights(self, buffers: HostBuffers | None = None) -> dict[str, torch.Tensor] | None:
        """The model's state dict on the CPU, whole, on rank 0; None on the others. Every rank must call it."""
        main = dist.get_rank() == 0
        weights: dict[str, torch.Tensor] = {}

        def keep(name: str, tensor: torch.Tensor) -> None:
            if main:
                weights[name] = tensor.detach().cpu().clone() if buffers is None else buffers.copy(name, tensor)

        for name, parameter in self.module.named_parameters():
            gather = [parameter] if hasattr(parameter, "ds_id") else []
            with deepspeed.zero.GatheredParameters(gather, enabled=bool(gather)):
                keep(name, parameter)
        for name, buffer in self.module.named_buffers():
            keep(name, buffer)
        return weights if main else None

    def snapshot(self, output_dir: Path, tag: str, client_state: dict, *, buffers: HostBuffers | None) -> Snapshot:
        """What this rank has to write into output_dir/tag, taken by DeepSpeed's save_checkpoint; nothing is written.

        Every rank must call it, at an optimizer-step boundary. buffers: host memory to copy into, so that
        training may go on at once; None: the snapshot is the live state, to be written before it does.
        """
        self._files.buffers = buffers
        self._engine.save_checkpoint(
            str(output_dir), tag=tag, client_state={CLIENT_KEY: client_state}, save_latest=False
        )
        snapshot = self._files.snapshot
        whole = next((f["module"] for path, f in snapshot.files.items() if path.name.startswith("mp_rank_00")), None)
        if self.zero_stage == 3:
            snapshot.weights = self.full_weights(buffers)
        elif dist.get_rank() == 0:
            snapshot.weights = dict(whole)
        if buffers is not None:
            buffers.wait()
        return snapshot

    def load(self, checkpoint: Path) -> None:
        """Takes up weights, masters, moments, schedule and counters.

        Any number of ranks and any ZeRO stage: DeepSpeed loads what was cut alike, the rest is put together
        from the shards and cut anew. The files must have been verified before: DeepSpeed loads flipped bits in
        silence. Raises CheckpointError on all ranks when one of them refuses a file.
        """
        layout = self.raise_on_all_ranks(lambda: read_layout(checkpoint))
        alike = layout == self._layout()
        state = self.raise_on_all_ranks(lambda: self._require_safe(checkpoint, alike))
        if not alike:
            self.load_full_state(state)
            return
        path, client = self._engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None or CLIENT_KEY not in client:
            raise CheckpointError(
                f"{checkpoint}: DeepSpeed found nothing to load, or the state of the run is missing; "
                f"choose another checkpoint with --resume_from"
            )

    def load_full_state(self, state: FullState) -> None:
        """Makes the engine's state that of another engine, or of the predecessor. Every rank must call it."""
        self.raise_on_all_ranks(lambda: install(state, self.module, self._engine.optimizer, self.zero_stage))
        schedule = self._engine.lr_scheduler
        position = {"last_epoch": state.run.step, "_step_count": state.run.step + 1}
        schedule.load_state_dict({**schedule.state_dict(), **(state.schedule or position)})
        self._engine.global_steps = state.run.step
        self._engine.global_samples = state.run.samples_consumed

    def _layout(self) -> Layout:
        """How this engine would cut a checkpoint."""
        zero = self.zero_stage > 0
        order = self._engine._get_zero_param_shapes() if zero else ()
        return Layout(
            family(self.zero_stage),
            dist.get_world_size() if zero else 1,
            "bf16" if self._engine.bfloat16_enabled() else "fp32",
            tuple(tuple(group) for group in order),
        )

    def _require_safe(self, checkpoint: Path, alike: bool) -> FullState | None:
        """Parses what this rank is about to load, before any collective waits for it."""
        if not alike:
            return read_full_state(checkpoint)
        rank = f"zero_pp_rank_{dist.get_rank()}_"
        for path in checkpoint.glob("*_states.pt"):
            if path.name.startswith("mp_rank_00") or path.name.removeprefix("bf16_").startswith(rank):
                safe_load.load(path, extra_allowed=DEEPSPEED_GLOBALS, mmap=True)
        return None

    def raise_on_all_ranks(self, call: Callable[[], T]) -> T:
        """The result of `call`, which reads files: CheckpointError on all ranks when one rank's has failed.

        So none waits in a collective for a lost one.
        """
        result, error = None, None
        try:
            result = call()
        except (CheckpointError, OSError) as err:
            error = err
        words: list = [None] * dist.get_world_size()
        dist.all_gather_object(words, None if error is None else str(error))
        said = list(dict.fromkeys(word for word in words if word is not None))
        if said:
            raise CheckpointError("\n".join(said)) from error
        return result

    def apply_hyperparameters(self, cfg: TrainingConfig) -> None:
        """Makes learning rates, decay, betas, eps and clipping those of `cfg`.

        Loading a checkpoint brings back the saved ones, and DeepSpeed then ignores a changed configuration.
        """
        schedule = self._engine.lr_scheduler
        factor = schedule_factor(cfg)(schedule.last_epoch)
        for index, group in enumerate(self.param_groups()):
            wanted = group_hyperparameters(group["name"], cfg)
            group.update(wanted, initial_lr=wanted["lr"], lr=wanted["lr"] * factor)
            schedule.base_lrs[index] = wanted["lr"]
        schedule._last_lr = [group["lr"] for group in self.param_groups()]
        if self.zero_stage > 0:
            self._engine.optimizer.clip_grad = cfg.grad_clip

    def destroy(self) -> None:
        self._engine.destroy()
