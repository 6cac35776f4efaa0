r"""Shape values to a prior by gradient descent, and remember every step.

The values are x = sigmoid(z), and the logits z are what is moved, so that x stays in (0, 1). What comes back
holds the values at each step: all that a figure or an animation needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.losses.functional import batch_shaping
from batchshaping.losses.generalized import GeneralizedBatchShapingLoss
from batchshaping.utils import warmup_factory

__all__ = ["Fit", "GeneralizedFit", "Progress", "fit", "fit_generalized", "published_start"]

Progress = Callable[[int, int, float], None]
"""Called after each step with the steps done, all steps, and the loss of this one."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What :func:`fit` did to N values.

    Attributes:
        values: the values before each step and after the last, of shape (steps + 1, N).
        losses: the loss at each step, taken before the values move, of shape (steps,).
        prior: what the values were shaped to.
    """

    values: Tensor
    losses: Tensor
    prior: Distribution

    @property
    def steps(self) -> int:
        """How often the values were moved."""
        return len(self.losses)


@dataclass(frozen=True, eq=False)
class GeneralizedFit:
    """What :func:`fit_generalized` did to T arrays of N values and to their priors.

    Attributes:
        values: the values before each step and after the last, of shape (steps + 1, T, N).
        means: the means of the learned priors, of shape (steps + 1, T).
        temperatures: their temperatures, of shape (steps + 1, T).
        prior_losses: the loss of the values against their priors, of shape (steps,).
        hyperprior_losses: the loss of the means against the hyperprior, its weight included, likewise.
        penalties: the penalty on the temperatures, its weight included, likewise.
        hyperprior: what the means were shaped to.
    """

    values: Tensor
    means: Tensor
    temperatures: Tensor
    prior_losses: Tensor
    hyperprior_losses: Tensor
    penalties: Tensor
    hyperprior: Distribution

    @property
    def steps(self) -> int:
        """How often the values were moved."""
        return len(self.prior_losses)

    @property
    def losses(self) -> Tensor:
        """The total loss at each step, of shape (steps,)."""
        return self.prior_losses + self.hyperprior_losses + self.penalties


def published_start(
    init: float = 4.0, n: int | Sequence[int] = 500, *, seed: int = 42, draw: int = 0
) -> Tensor:
    r"""Logits from the published random start, whatever the state of PyTorch's own generator.

    .. math::
        z \sim \mathrm{U}(-\text{init}, \text{init})

    Args:
        init: half the width of the interval.
        n: how many logits, or their shape.
        seed: seed of the random numbers.
        draw: how many draws of this size come before. The published runs share one stream: the k-th of them,
            counted from 0, starts from draw k.

    Returns:
        Logits of shape (n,), or of the shape given, in the default dtype.

    Example:
        >>> torch.manual_seed(42)
        <torch._C.Generator object at ...>
        >>> (published_start() == (2 * torch.rand(500) - 1) * 4).all()
        tensor(True)
        >>> (published_start(draw=1) == (2 * torch.rand(500) - 1) * 4).all()
        tensor(True)
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (n,) if isinstance(n, int) else tuple(n)
    for _ in range(draw):
        torch.rand(shape, generator=generator)
    return (2 * torch.rand(shape, generator=generator) - 1) * init


def _descent(
    parameters: Iterable[Tensor],
    objective: Callable[[], Tensor],
    steps: int,
    schedule: Callable[[int], float],
    progress: Progress | None,
) -> Iterator[tuple[int, Tensor]]:
    """Adam; yields each step and its loss while the parameters still are what gave that loss."""
    optimizer = torch.optim.Adam(parameters, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(steps):
        loss = objective()
        optimizer.zero_grad()
        loss.backward()
        yield step, loss.detach()
        optimizer.step()
        scheduler.step()
        if progress is not None:
            progress(step + 1, steps, loss.item())


def fit(
    start: Tensor,
    prior: Distribution,
    *,
    steps: int = 200,
    learning_rate: float = 0.1,
    loss: Callable[[Tensor], Tensor] | None = None,
    progress: Progress | None = None,
) -> Fit:
    r"""Shape the values x = sigmoid(z) to a prior, with Adam on the logits z.

    Args:
        start: the logits to start from, of shape (N,) and floating dtype; left as they are.
        prior: the distribution that the values shall have, one with a ``cdf``.
        steps: how often the values are moved, at least once.
        learning_rate: of Adam, in logits: about how far a logit moves at one step.
        loss: from values of shape (N,) to a scalar; None is ``batch_shaping`` to the prior.
        progress: called after each step with the steps done, all steps, and the loss of this one.

    Returns:
        The values and losses of all steps.

    Raises:
        TypeError: if the start is not floating point.
        ValueError: if the start is not of shape (N,) with N > 0, or there is no step.

    Example:
        >>> from batchshaping import Beta
        >>> shaped = fit(published_start(), Beta(0.6, 0.4), steps=100)
        >>> shaped.values.shape, shaped.losses.shape
        (torch.Size([101, 500]), torch.Size([100]))
        >>> print(f"{shaped.losses[0]:.3f} -> {shaped.losses[-1]:.6f}")
        0.015 -> 0.000012
    """
    _check(start, ("N",), steps)
    objective = partial(batch_shaping, prior=prior) if loss is None else loss
    logits = start.detach().clone().requires_grad_()
    values = logits.new_empty(steps + 1, *start.shape)
    losses = logits.new_empty(steps)
    schedule = warmup_factory(0, learning_rate)
    for step, value in _descent(
        [logits], lambda: objective(torch.sigmoid(logits)), steps, schedule, progress
    ):
        values[step], losses[step] = torch.sigmoid(logits.detach()), value
    values[steps] = torch.sigmoid(logits.detach())
    return Fit(values, losses, prior)


def fit_generalized(
    start: Tensor,
    loss: GeneralizedBatchShapingLoss | None = None,
    *,
    steps: int = 350,
    learning_rate: float = 0.3,
    warmup_steps: int = 20,
    progress: Progress | None = None,
) -> GeneralizedFit:
    r"""Shape the values x = sigmoid(z) of several arrays to priors that are learned with them.

    Args:
        start: the logits to start from, of shape (T, N) and floating dtype; left as they are.
        loss: the loss that owns the learned priors, made with ``dim=1``, and trained in place; None is a
            new ``GeneralizedBatchShapingLoss(T, dim=1)`` with its default hyperprior.
        steps: how often the values are moved, at least once.
        learning_rate: of Adam after the warm-up, for the logits of values, means and temperatures alike.
        warmup_steps: steps over which the learning rate grows linearly.
        progress: called after each step with the steps done, all steps, and the total loss of this one.

    Returns:
        The values, the priors and the parts of the loss at all steps.

    Raises:
        TypeError: if the start is not floating point.
        ValueError: if the start is not of shape (T, N) with values in it, the loss has priors of another
            shape, or there is no step.

    Example:
        >>> shaped = fit_generalized(published_start(n=(30, 500)), steps=10)
        >>> shaped.values.shape, shaped.means.shape, shaped.losses.shape
        (torch.Size([11, 30, 500]), torch.Size([11, 30]), torch.Size([10]))
    """
    _check(start, ("T", "N"), steps)
    arrays = start.shape[0]
    if loss is None:
        loss = GeneralizedBatchShapingLoss(arrays, dim=1).to(start)
    logits = start.detach().clone().requires_grad_()
    history = GeneralizedFit(
        values=logits.new_empty(steps + 1, *start.shape),
        means=logits.new_empty(steps + 1, arrays),
        temperatures=logits.new_empty(steps + 1, arrays),
        prior_losses=logits.new_empty(steps),
        hyperprior_losses=logits.new_empty(steps),
        penalties=logits.new_empty(steps),
        hyperprior=loss.hyperprior,
    )

    def record(step: int) -> None:
        history.values[step] = torch.sigmoid(logits.detach())
        history.means[step], history.temperatures[step] = loss.mean.detach(), loss.temperature.detach()

    schedule = warmup_factory(warmup_steps, learning_rate)
    learned = [logits, *loss.parameters()]
    for step, _ in _descent(learned, lambda: loss(torch.sigmoid(logits)), steps, schedule, progress):
        record(step)
        history.prior_losses[step] = loss.prior_loss
        history.hyperprior_losses[step] = loss.hyperprior_loss
        history.penalties[step] = loss.temperature_penalty
    record(steps)
    return history


def _check(start: Tensor, shape: tuple[str, ...], steps: int) -> None:
    if not start.is_floating_point():
        raise TypeError(f"start must be floating point, received {start.dtype}")
    if start.ndim != len(shape) or start.numel() == 0:
        expected = f"({', '.join(shape)}{',' if len(shape) == 1 else ''})"
        raise ValueError(f"start must be logits of shape {expected}, received shape {tuple(start.shape)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, received {steps}")
