"""Small helpers of the published interface."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["set_seed", "to_numpy", "warmup_factory"]


def set_seed(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and PyTorch.

    Example:
        >>> set_seed(42)
        >>> torch.rand(2)
        tensor([0.8823, 0.9150])
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (code that uses NumPy's global generator expects it)
    torch.manual_seed(seed)


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The values of a tensor on any device, with or without a graph, as a NumPy array.

    Example:
        >>> to_numpy(torch.ones(2, requires_grad=True))
        array([1., 1.], dtype=float32)
    """
    values: np.ndarray[Any, Any] = tensor.detach().cpu().numpy()
    return values


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
