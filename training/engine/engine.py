"""The only module that imports DeepSpeed: process group, training step, snapshots for saving, loading.

Written against DeepSpeed 0.19.8, whose private attributes it uses; so do zero_internals.py and reshape.py beside it,
which are given DeepSpeed's optimizers. A new version of DeepSpeed means checking these three.
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
from training.engine.rendezvous import Meeting  # noqa: E402
from training.engine.reshape import install, zero_padding  # noqa: E402
from training.engine.snapshot import HostBuffers, Snapshot, host_tree  # noqa: E402
from training.engine.world import World, environment_world_size  # noqa: E402
from training.engine.zero_internals import MasterSubset, drop_gradients, gradient_squares  # noqa: E402

DEEPSPEED_GLOBALS = (LossScaler, ZeroStageEnum, fragment_address)
"""The classes that DeepSpeed pickles into its checkpoint files: what the safe loader allows there besides tensors."""

T = TypeVar("T")

DEEPSPEED_VERSION: str = deepspeed.__version__


def start(timeout_s: float, *, verbose: bool = False, meeting: Meeting | None = None) -> World:
    """Joins the process group of the launcher (`deepspeed` or `torchrun`); without one, makes a group of one rank.

    timeout_s: how long a collective waits for a late rank before it raises. verbose: DeepSpeed logs at level INFO.
    meeting: where the ranks have met already; the group is made from its store.
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
        # On a CPU init_distributed would compile an operator (35-60 s) that only inference uses and that leaves 69 MB
        # per rank in /dev/shm for good.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_logger.setLevel(logging.INFO if verbose else logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    # nothing in training draws from it; seeded all the same, so that runs cannot differ by accident
    random.seed(0)
    if meeting is not None:
        # as DeepSpeed would, but from the store that exists: its port is taken
        dist.init_process_group(
            get_accelerator().communication_backend_name(),
            store=dist.PrefixStore("group", meeting.store),
            rank=meeting.rank,
            world_size=meeting.size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if on_gpu else None,
        )
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=timeout_s))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, local_size, device)


class _SnapshotFiles(CheckpointEngine):
    """Replaces DeepSpeed's own writing and reading of checkpoint files.

    `save` writes nothing: it copies a file's content to host memory, into `snapshot`, and training.checkpointing writes
    it. `load` reads a file with safe_load, which executes nothing that is pickled in it. buffers: the host memory to
    copy into; None: tensors that are compact and on the host already are not copied.
    """

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
    """With ZeRO 2 and overlap_comm, makes two CUDA streams wait for each other in place of the host for the device.

    DeepSpeed calls device.synchronize() in every micro-batch, for two reasons: the reduction stream may still be
    summing gradients that are about to be freed, and it may be about to read gradients that are still being computed.
    For both it suffices that the streams wait for each other. Do not use it where gradients are offloaded: then the
    host reads them, and has to wait.
    """
    epilogue, accelerator = optimizer.independent_gradient_partition_epilogue, get_accelerator()

    def order_streams(device_index: int | None = None) -> None:
        computing, reducing = accelerator.current_stream(), optimizer.reduction_stream
        reducing.wait_stream(computing)
        computing.wait_stream(reducing)

    def without_waiting() -> None:
        synchronize, accelerator.synchronize = accelerator.synchronize, order_streams
        try:
            epilogue()
        finally:
            accelerator.synchronize = synchronize

    optimizer.independent_gradient_partition_epilogue = without_waiting


class Engine:
    """A model whose gradients, optimizer state and checkpoints are managed by DeepSpeed.

    model: on the CPU in float32, the same on every rank. ds_config: complete, without "auto".
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
        self._files = _SnapshotFiles()
        self._engine.checkpoint_engine = self._files
        # otherwise every run folder gets a script that loads pickles unsafely
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
        """Accumulates the gradient of `loss` / (accumulation steps x ranks)."""
        self._engine.backward(loss)

    def at_boundary(self) -> bool:
        """Whether the micro-batch whose backward pass has ended is the last one of its step."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def step(self, *, drop: bool = False) -> bool:
        """To be called after every micro-batch; after the last one of a step it updates the weights and returns True.

        drop: the step counts, also for the schedule, but its gradient is discarded and no weight changes.
        """
        boundary = self.at_boundary()
        if boundary and self.zero_stage == 0:
            # DeepSpeed reports no gradient norm at stage 0 in float32
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
        """This rank's share of the squared gradient norm by part of the model. Call it at a boundary, before `step`."""
        return gradient_squares(self.module, self._engine.optimizer, self.zero_stage)

    def master_subset(self) -> MasterSubset:
        """A subset of the master weights as they are before `step`, to measure the step's update with."""
        return MasterSubset(self._engine.optimizer, self.zero_stage)

    def grad_norm(self) -> float:
        """L2 norm of the last step's gradient over all ranks, before clipping; NaN when it was not finite."""
        return float("nan") if self._grad_norm is None else float(self._grad_norm)

    def param_groups(self) -> list[dict]:
        return self._engine.optimizer.param_groups

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of the next update, by group name."""
        return {group["name"]: float(group["lr"]) for group in self.param_groups()}

    def full_weights(self, buffers: HostBuffers | None = None) -> dict[str, torch.Tensor] | None:
        """The model's full state dict on the CPU, on rank 0; None on the others. Every rank must call it."""
        is_main = dist.get_rank() == 0
        weights: dict[str, torch.Tensor] = {}

        def add(name: str, tensor: torch.Tensor) -> None:
            if is_main:
                weights[name] = tensor.detach().cpu().clone() if buffers is None else buffers.copy(name, tensor)

        for name, parameter in self.module.named_parameters():
            gather = [parameter] if hasattr(parameter, "ds_id") else []
            with deepspeed.zero.GatheredParameters(gather, enabled=bool(gather)):
                add(name, parameter)
        for name, buffer in self.module.named_buffers():
            add(name, buffer)
        return weights if is_main else None

    def snapshot(self, output_dir: Path, tag: str, client_state: dict, *, buffers: HostBuffers | None) -> Snapshot:
        """What this rank has to write into output_dir/tag, collected by DeepSpeed's save_checkpoint. Writes nothing.

        Every rank must call it, after a finished optimizer step. buffers: host memory to copy the state into, so that
        training can go on at once. None: the snapshot is the live state and must be written before training goes on.
        """
        self._files.buffers = buffers
        self._engine.save_checkpoint(
            str(output_dir), tag=tag, client_state={CLIENT_KEY: client_state}, save_latest=False
        )
        snapshot = self._files.snapshot
        module = next((f["module"] for path, f in snapshot.files.items() if path.name.startswith("mp_rank_00")), None)
        if self.zero_stage == 3:
            snapshot.weights = self.full_weights(buffers)
        elif dist.get_rank() == 0:
            snapshot.weights = dict(module)
        if buffers is not None:
            buffers.wait()
        return snapshot

    def load(self, checkpoint: Path) -> None:
        """Loads weights, masters, moments, schedule and counters. Every rank must call it.

        The checkpoint may come from any number of ranks and any ZeRO stage: DeepSpeed loads it when it is partitioned
        as this engine is, otherwise the full state is assembled from the shards and partitioned again. Verify the files
        first: DeepSpeed loads flipped bits without an error. Raises CheckpointError on all ranks when one of them
        refuses a file.
        """
        layout = self.raise_on_all_ranks(lambda: read_layout(checkpoint))
        if layout != self._layout():
            self.load_full_state(self.raise_on_all_ranks(lambda: read_full_state(checkpoint)))
            return
        self.raise_on_all_ranks(lambda: self._require_safe(checkpoint))
        path, client = self._engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None or CLIENT_KEY not in client:
            raise CheckpointError(
                f"{checkpoint}: DeepSpeed found nothing to load, or the state of the run is missing; "
                f"choose another checkpoint with --resume_from"
            )

    def load_full_state(self, state: FullState) -> None:
        """Loads a full state: of an engine with another layout, or of a legacy checkpoint. Every rank must call it.

        A legacy state has no schedule: its position is then computed from the step. Raises CheckpointError on all ranks
        when the state does not fit the model or the ZeRO stage.
        """
        self.raise_on_all_ranks(lambda: install(state, self.module, self._engine.optimizer, self.zero_stage))
        schedule = self._engine.lr_scheduler
        position = {"last_epoch": state.run.step, "_step_count": state.run.step + 1}
        schedule.load_state_dict({**schedule.state_dict(), **(state.schedule or position)})
        self._engine.global_steps = state.run.step
        self._engine.global_samples = state.run.samples_consumed

    def _layout(self) -> Layout:
        """How the checkpoints of this engine are partitioned."""
        zero = self.zero_stage > 0
        order = self._engine._get_zero_param_shapes() if zero else ()
        return Layout(
            family(self.zero_stage),
            dist.get_world_size() if zero else 1,
            "bf16" if self._engine.bfloat16_enabled() else "fp32",
            tuple(tuple(group) for group in order),
        )

    def _require_safe(self, checkpoint: Path) -> None:
        """Reads the files that DeepSpeed will load on this rank, so that a refusal comes before any collective."""
        rank = f"zero_pp_rank_{dist.get_rank()}_"
        for path in checkpoint.glob("*_states.pt"):
            if path.name.startswith("mp_rank_00") or path.name.removeprefix("bf16_").startswith(rank):
                safe_load.load(path, extra_allowed=DEEPSPEED_GLOBALS, mmap=True)

    def raise_on_all_ranks(self, call: Callable[[], T]) -> T:
        """Calls `call`, which reads files, and returns this rank's result. Every rank must call it.

        When `call` raises CheckpointError or OSError on some ranks, all ranks raise CheckpointError with the messages
        of those, so that none waits in a later collective for a rank that is gone.
        """
        result, error = None, None
        try:
            result = call()
        except (CheckpointError, OSError) as err:
            error = err
        of_ranks: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, None if error is None else str(error))
        messages = list(dict.fromkeys(message for message in of_ranks if message is not None))
        if messages:
            raise CheckpointError("\n".join(messages)) from error
        return result

    def apply_hyperparameters(self, cfg: TrainingConfig) -> None:
        """Sets learning rates, weight decay, betas, eps and gradient clipping to those of `cfg`.

        Necessary after loading: DeepSpeed restores the saved values and ignores a changed configuration.
        """
        schedule = self._engine.lr_scheduler
        factor = schedule_factor(cfg)(schedule.last_epoch)
        for index, group in enumerate(self.param_groups()):
            new = group_hyperparameters(group["name"], cfg)
            group.update(new, initial_lr=new["lr"], lr=new["lr"] * factor)
            schedule.base_lrs[index] = new["lr"]
        schedule._last_lr = [group["lr"] for group in self.param_groups()]
        if self.zero_stage > 0:
            self._engine.optimizer.clip_grad = cfg.grad_clip

    def destroy(self) -> None:
        self._engine.destroy()
