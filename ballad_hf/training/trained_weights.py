"""The weights that a phase changes, as named tensors: taken, put back, and shared over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)


def take_weights(module: nn.Module, copy: bool = True) -> dict[str, torch.Tensor]:
    """Parameters that take gradients, and all buffers that are saved, on the CPU.

    Args:
        module: plain, or as the accelerator prepared it.
        copy: else tensors on the CPU share the module's memory, for a caller that writes them at once.

    Returns:
        Tensors by name; a collective call where the module is sharded, and then empty but on the main process.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state: dict[str, Any] = get_model_state_dict(module, options=options)
    return {name: value.detach().clone() if copy else value.detach() for name, value in state.items()}


def put_weights(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `take_weights` gave. Where there are several processes, all get the main one's tensors, and those
    of the others count for nothing.

    Raises:
        ValueError: tensors of another module.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several, strict=False)
    given: Any = {} if several and dist.get_rank() else dict(tensors)
    unknown = set_model_state_dict(module, given, options=options).unexpected_keys
    if unknown:
        raise ValueError(f"The weights belong to another model: it has no {', '.join(sorted(unknown)[:5])}.")
