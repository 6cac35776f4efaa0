"""Small helpers of the published interface."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["set_seed", "to_numpy", "validate_prior_param", "warmup_factory"]


def set_seed(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and PyTorch, and the hashes of Python processes to come.

    Example:
        >>> set_seed(42)
        >>> torch.rand(2)
        tensor([0.8823, 0.9150])
    """
    os.environ["PYTHONHASHSEED"] = str(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (code that uses NumPy's global generator expects it)
    torch.manual_seed(seed)


def to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    """A copy of values as a NumPy array.

    Args:
        tensor: a tensor on any device, with or without a graph; a list of numbers; or an array.

    Example:
        >>> to_numpy(torch.ones(2, requires_grad=True))
        array([1., 1.], dtype=float32)
        >>> to_numpy([1, 2])
        array([1, 2])
    """
    return np.array(tensor.detach().cpu().numpy() if isinstance(tensor, Tensor) else tensor)


def validate_prior_param(
    prior_param: Tensor | float, dim0: int, device: torch.device | str = "cpu"
) -> Tensor:
    """A parameter of a prior in the shape that broadcasts over values of shape (arrays, samples).

    Args:
        prior_param: a number; a 0-d tensor, shared by all arrays; or a 1-d tensor with one value an array.
        dim0: how many arrays there are.
        device: where a number becomes a tensor; a tensor stays where it is, and in its graph.

    Returns:
        A tensor of shape (1, 1), or of shape (dim0, 1) where each array has a value of its own.

    Raises:
        ValueError: if it has another shape.

    Example:
        >>> validate_prior_param(0.5, 3)
        tensor([[0.5000]])
        >>> validate_prior_param(torch.tensor([0.2, 0.4, 0.6]), 3).shape
        torch.Size([3, 1])
    """
    if not isinstance(prior_param, Tensor):
        return torch.tensor([[float(prior_param)]], device=device)
    if prior_param.ndim > 1 or prior_param.numel() not in (1, dim0):
        raise ValueError(
            f"prior_param must be a number, a tensor of shape () or one of shape ({dim0},), "
            f"received shape {tuple(prior_param.shape)}"
        )
    return prior_param.reshape(-1, 1)


def warmup_factory(
    num_warmup_steps: int, learning_rate: float, min_learning_rate: float = 1e-4
) -> Callable[[int], float]:
    """A learning-rate schedule, from step to rate: linear up to the learning rate, then constant.

    Args:
        num_warmup_steps: the step at which the learning rate is reached.
        learning_rate: the rate from then on.
        min_learning_rate: the rate at step 0.

    Example:
        >>> schedule = warmup_factory(10, learning_rate=0.3)
        >>> [round(schedule(step), 5) for step in (0, 5, 10, 100)]
        [0.0001, 0.15005, 0.3, 0.3]
    """

    def rate(step: int) -> float:
        if step >= num_warmup_steps:
            return learning_rate
        return min_learning_rate + (learning_rate - min_learning_rate) * step / num_warmup_steps

    return rate
