"""Reads a whole training state, parameter by parameter, from the shards of any checkpoint of this project.

DeepSpeed cuts float32 masters and Adam's moments into shards for one number of ranks and one ZeRO stage. This module
presents them as whole parameters again. The shards are memory maps that are read on first use, so that an engine with
another number of ranks or stage can load them with one parameter in memory at a time. Nothing in the files is executed,
and DeepSpeed need not be installed. Layout of the files: docs/checkpoints.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from gsa.checkpoint import safe_load
from gsa.checkpoint.manifest import CheckpointError
from gsa.checkpoint.state import CLIENT_KEY, RunState
from gsa.weights import WEIGHTS, load_weights

Moment = Literal["exp_avg", "exp_avg_sq"]
What = Literal["master", "exp_avg", "exp_avg_sq"]


class _Inert:
    """Stands in for a class of DeepSpeed that a file names: takes its fields and has no code."""

    def __init__(self, *args: object) -> None:
        self.args = args


class _Fragment(_Inert):
    numel: int
    start: int


_STAND_INS = (
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
)

_OPTIMIZER_SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
_MODEL = "mp_rank_00_model_states.pt"
_NOT_OURS = "not laid out as DeepSpeed 0.19.8 lays out a checkpoint of this project"


@dataclass(frozen=True)
class Layout:
    """How a checkpoint is cut into shards.

    family: 0 (not cut), 2 (ZeRO 1 and 2, which cut in the same way) or 3. ranks: number of shards; 1 for family 0.
    order: names of the parameters in the order of the shards, one tuple per DeepSpeed group.
    """

    family: int
    ranks: int
    precision: Literal["bf16", "fp32"]
    order: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        stage = {0: "ZeRO 0", 2: "ZeRO 1 or 2", 3: "ZeRO 3"}[self.family]
        return f"{stage}, {self.precision}" + (f", {self.ranks} rank(s)" if self.family else "")


def family(zero_stage: int) -> int:
    """The `family` of Layout for a ZeRO stage."""
    return 2 if zero_stage == 1 else zero_stage


@dataclass
class ParameterState:
    """The optimizer's state of one whole parameter, float32, on the CPU.

    step: Adam's count of updates of it. A moment that the optimizer has not created yet is zero.
    """

    shape: torch.Size
    step: float = 0.0
    pieces: dict[str, list[torch.Tensor]] = field(
        default_factory=lambda: {"master": [], "exp_avg": [], "exp_avg_sq": []}
    )
    """consecutive flat parts of the master and of each moment"""

    def full(self, what: What) -> torch.Tensor:
        """The whole tensor, copied from the files; zeros for a moment that does not exist."""
        parts = self.pieces[what]
        if not parts:
            return torch.zeros(self.shape)
        return torch.cat([part.to(torch.float32) for part in parts]).reshape(self.shape)

    def numel(self, what: What) -> int:
        """How many elements the files hold."""
        return sum(part.numel() for part in self.pieces[what])


@dataclass(frozen=True)
class FullState:
    """The state of a run, independent of ZeRO stage and number of ranks.

    parameters: by name, in the order of the model. groups: hyper-parameters by group name. buffers: by name.
    schedule: the learning-rate scheduler's state dict; None: the schedule starts at the run's step. run: the state
    that the trainer saved; None: a model without a run.
    """

    parameters: Mapping[str, ParameterState]
    groups: Mapping[str, Mapping[str, Any]]
    buffers: Mapping[str, torch.Tensor]
    schedule: Mapping[str, Any] | None
    run: RunState | None


def read_layout(step_dir: Path) -> Layout:
    """How a checkpoint is cut. Raises CheckpointError when its files fit no layout, or a shard is missing."""
    names = {path.name for path in step_dir.iterdir()} if step_dir.is_dir() else set()
    optimizer_ranks = sorted(int(m[1]) for name in names if (m := _OPTIMIZER_SHARD.fullmatch(name)))
    model_ranks = sorted(int(m[1]) for name in names if (m := _MODEL_SHARD.fullmatch(name)))
    if optimizer_ranks != list(range(len(optimizer_ranks))):
        raise CheckpointError(f"{step_dir}: optimizer shards of ranks {optimizer_ranks} only; restore the others")
    if model_ranks and model_ranks != optimizer_ranks:
        raise CheckpointError(
            f"{step_dir}: model shards of ranks {model_ranks}, optimizer's of {optimizer_ranks}; restore the rest"
        )
    if not model_ranks and _MODEL not in names:
        raise CheckpointError(f"{step_dir}: no {_MODEL} and no model shards; is it a checkpoint?")
    cut = 3 if model_ranks else 2 if optimizer_ranks else 0
    path = _model_file(step_dir)
    model = _load(path)
    with _naming_the_file(path):
        order = tuple(tuple(group) for group in model["param_shapes"] or ())
    precision = "bf16" if any(name.startswith("bf16_") for name in names) else "fp32"
    return Layout(cut, max(1, len(optimizer_ranks)), precision, order)


def read_run_state(step_dir: Path) -> RunState:
    """The state that the trainer saved. Raises CheckpointError when the file is missing, damaged or unsafe."""
    return _run_state(step_dir, _load(_model_file(step_dir)))


def read_ds_config(step_dir: Path) -> dict[str, Any]:
    """The DeepSpeed configuration of the engine that saved, which it writes beside the weights; empty without one."""
    config = _load(_model_file(step_dir)).get("ds_config")
    return config if isinstance(config, dict) else {}


def require_own_name(step_dir: Path, run: RunState) -> None:
    """Raises CheckpointError unless a folder is named after the step in it: DeepSpeed relies on the name."""
    if step_dir.name != f"step_{run.step}":
        raise CheckpointError(f"{step_dir} holds step {run.step}: it was renamed; name it step_{run.step} again")


def read_full_state(step_dir: Path) -> FullState:
    """The whole state of a verified checkpoint, whose files must not change as long as the state is used.

    Raises CheckpointError, naming the file, when one is unsafe or does not hold what it should.
    """
    layout = read_layout(step_dir)
    model_file = _model_file(step_dir)
    model = _load(model_file)
    run = _run_state(step_dir, model)
    with _naming_the_file(model_file):
        shapes = _shapes(model)
        schedule = model["lr_scheduler"]
        buffer_names = list(model["buffer_names"])
    _, weights = load_weights(step_dir, verified=True)
    missing = [name for name in (*shapes, *buffer_names) if name not in weights]
    if missing:
        raise CheckpointError(f"{step_dir / WEIGHTS}: lacks {', '.join(missing[:5])}; restore it from a copy")
    parameters = {name: ParameterState(shape) for name, shape in shapes.items()}
    if layout.family == 3:
        for rank in range(1, layout.ranks):  # they hold nothing new, but must be safe: an engine will read them
            _load(step_dir / f"zero_pp_rank_{rank}_{_MODEL}")
    if layout.family == 0:
        with _naming_the_file(model_file):
            groups = _add_whole(model, parameters)
    else:
        shards = [_load(path) for path in _optimizer_files(step_dir, layout.ranks)]
        for number, (path, shard) in enumerate(zip(_optimizer_files(step_dir, layout.ranks), shards, strict=True)):
            with _naming_the_file(path):
                state = shard["optimizer_state_dict"]
                count = state["partition_count"]
                if (count if isinstance(count, int) else max(count)) != layout.ranks:
                    raise CheckpointError(
                        f"one shard of {count} ranks, of which {layout.ranks} are here; restore the rest"
                    )
                if layout.family == 2:
                    groups = _add_flat_partition(state, parameters)
                else:
                    groups = _add_cut_parameters(state, model["param_shapes"], number, layout.ranks, parameters)
    for name, parameter in parameters.items():
        for what in ("master", "exp_avg", "exp_avg_sq"):
            found = parameter.numel(what)
            if found != parameter.shape.numel() and (found or what == "master"):
                raise CheckpointError(
                    f"{step_dir}: the shards hold {found} of the {parameter.shape.numel()} numbers of {name}'s {what}; "
                    f"restore them from a copy, or take another checkpoint"
                )
    return FullState(parameters, groups, {name: weights[name] for name in buffer_names}, schedule, run)


# -- the three layouts --------------------------------------------------------------------------------------


def _add_whole(model: dict, parameters: dict[str, ParameterState]) -> dict[str, dict]:
    """ZeRO 0: the state dict of a torch optimizer, which numbers the parameters through its groups."""
    state, groups = model["optimizer"]["state"], model["optimizer"]["param_groups"]
    for group in groups:
        for name, number in zip(group["param_names"], group["params"], strict=True):
            _add(name, parameters[name], model["module"][name].flatten(), state.get(number), slice(None))
    return _hyperparameters(groups)


def _add_flat_partition(state: dict, parameters: dict[str, ParameterState]) -> dict[str, dict]:
    """ZeRO 1 and 2: a group is one flat tensor, of which each rank has a range, and a map of the parameters in it."""
    base = state["base_optimizer_state"]
    flats, mappings = state["single_partition_of_fp32_groups"], state["param_slice_mappings"]
    for number, (flat, mapping) in enumerate(zip(flats, mappings, strict=True)):
        for name, at in mapping.items():
            here = slice(at.start, at.start + at.numel)
            _add(name, parameters[name], flat[here], base["state"].get(number), here)
    return _hyperparameters(base["param_groups"])


def _add_cut_parameters(
    state: dict, shapes: list[dict], rank: int, ranks: int, parameters: dict[str, ParameterState]
) -> dict[str, dict]:
    """ZeRO 3: a parameter is cut into equal parts, the last one padded; a sub-group is a sequence of such parts."""
    base = state["optimizer_state_dict"]
    for number, (flat, sub_group) in enumerate(zip(state["fp32_flat_groups"], shapes, strict=True)):
        offset = 0
        for name, shape in sub_group.items():
            whole = math.prod(shape)
            width = -(-whole // ranks)
            mine = max(0, min(width, whole - rank * width))
            here = slice(offset, offset + mine)
            _add(name, parameters[name], flat[here], base["state"].get(number), here)
            offset += width
        if offset != flat.numel():
            raise CheckpointError(f"sub-group {number} has {flat.numel()} numbers, its parameters {offset}")
    return _hyperparameters(base["param_groups"])


def _add(name: str, parameter: ParameterState, master: torch.Tensor, adam: Mapping | None, here: slice) -> None:
    parameter.pieces["master"].append(master.detach())
    if adam:
        step = float(adam["step"])
        if parameter.pieces["exp_avg"] and step != parameter.step:
            raise CheckpointError(
                f"Adam has done {step:.0f} updates of {name} here, {parameter.step:.0f} in the shards before it: they "
                f"are of different saves; restore them from a copy, or take another checkpoint"
            )
        parameter.step = step
        for moment in ("exp_avg", "exp_avg_sq"):
            parameter.pieces[moment].append(adam[moment].detach().flatten()[here])


def _hyperparameters(groups: list[dict]) -> dict[str, dict]:
    keys = ("lr", "initial_lr", "weight_decay", "betas", "eps")
    return {group["name"]: {key: group[key] for key in keys} for group in groups}


# -- files -------------------------------------------------------------------------------------------------


def _shapes(model: dict) -> dict[str, torch.Size]:
    """The shape of every parameter, in the order of the model."""
    buffers = set(model["buffer_names"])
    names = [name for name in model["module"] if name not in buffers]
    if model["param_shapes"] is None:
        return {name: model["module"][name].shape for name in names}
    shapes = {name: torch.Size(shape) for group in model["param_shapes"] for name, shape in group.items()}
    return {name: shapes[name] for name in names if name in shapes}


def _model_file(step_dir: Path) -> Path:
    cut = step_dir / f"zero_pp_rank_0_{_MODEL}"
    return cut if cut.exists() else step_dir / _MODEL


def _optimizer_files(step_dir: Path, ranks: int) -> list[Path]:
    by_rank = {int(m[1]): path for path in step_dir.iterdir() if (m := _OPTIMIZER_SHARD.fullmatch(path.name))}
    return [by_rank[rank] for rank in range(ranks)]


def _run_state(step_dir: Path, model: dict) -> RunState:
    if CLIENT_KEY not in model:
        raise CheckpointError(f"{step_dir}: the state of the run ({CLIENT_KEY}) is missing; it is {_NOT_OURS}")
    return RunState.from_dict(model[CLIENT_KEY])


def _load(path: Path) -> dict:
    loaded = safe_load.load(path, extra_allowed=_STAND_INS, mmap=True)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: {_NOT_OURS}")
    return loaded


@contextmanager
def _naming_the_file(path: Path) -> Iterator[None]:
    """Turns an error that the content of a safe file causes in this reader into a CheckpointError with its name."""
    try:
        yield
    except CheckpointError as err:
        raise CheckpointError(f"{path}: {err}") from err
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as err:
        raise CheckpointError(
            f"{path}: {_NOT_OURS} ({type(err).__name__}: {err}); resume it once with the ranks and the ZeRO stage "
            f"that made it, or take another checkpoint"
        ) from err
