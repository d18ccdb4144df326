"""Gather rows over processes, with gradients, so that a loss sees the global batch.

`torch.distributed.nn.functional.all_gather` does the same; torch 2.13 deprecates it for a private function.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of every process, one process after the other; the same on each.

    The gradient of a row is the sum of its gradients on all processes. Where each computes the same global loss, or
    its own part of a mean, averaging parameter gradients over processes (as DDP and FSDP do) gives those of one.

    Args:
        rows: (rows, ...), as many on every process.

    Returns:
        (processes * rows, ...); `rows` itself without other processes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        ctx.rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]
