"""Parameters as FSDP2 (``torch.distributed.fsdp.fully_shard``) leaves them outside forward: in shards."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def whole(tensor: Any) -> Tensor:
    """The whole of a sharded tensor, differentiable: a collective, so every rank must call it; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def scalar(tensor: Tensor) -> Tensor:
    """A parameter of shape (1,) as a 0-d tensor, differentiable; FSDP2 cannot shard 0-d parameters.

    Example:
        >>> import torch
        >>> scalar(torch.ones(1))
        tensor(1.)
    """
    return whole(tensor).reshape(())
