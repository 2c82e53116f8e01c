"""Builds the engine of a run from its configuration. Every run and every trial sets its model up here."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from gsa import GSAForCausalLM
from gsa.kernels import Backend
from gsa.kernels.choice import Shape, resolve
from gsa.weights import load_weights
from training.config import RunConfig
from training.engine.engine import Engine
from training.engine.optimizer import build_optimizer, build_schedule
from training.engine.world import World


class Built(NamedTuple):
    """backend: the kernels', the same on every rank. fault: why "auto" did not choose the fastest one, or None."""

    engine: Engine
    backend: Backend
    fault: str | None


def build_engine(cfg: RunConfig, ds_config: dict, world: World, *, init_from: str | None) -> Built:
    """Builds the engine of a run; every rank must call it.

    init_from: a checkpoint folder whose weights the model starts with. Without one the initial weights depend on
    training.seed only: they are the same on every rank, device and ZeRO stage.
    """
    # the model is made on the CPU, by the CPU's generator
    torch.manual_seed(cfg.training.seed)
    model = GSAForCausalLM(cfg.model)
    if init_from is not None:
        model.load_state_dict(load_weights(Path(init_from))[1])
    backend, fault = _backend(cfg, world)
    model.set_backend(backend)
    model.set_activation_checkpointing(cfg.training.recomputed)
    if cfg.training.compile:
        model.compile_parts()
    optimizer = build_optimizer(model, cfg.training)
    return Built(Engine(model, optimizer, build_schedule(optimizer, cfg.training), ds_config), backend, fault)


def _backend(cfg: RunConfig, world: World) -> tuple[Backend, str | None]:
    """The backend for all ranks, with "auto" resolved, and the fault of the first rank that found one."""
    c = cfg.model
    dtype = torch.bfloat16 if cfg.training.precision == "bf16" else torch.float32
    shape = Shape(c.n_heads, c.n_kv_heads, c.d_head, c.n_indexer_heads, c.d_indexer, dtype)
    found = world.gather(resolve(cfg.training.backend, shape, world.device))
    return next(((backend, fault) for backend, fault in found if fault), found[0])
