"""Runs of channel-gated networks: what their gates do by layer, epoch and class, and for which images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from batchshaping.priors.families import Beta
from batchshaping.report.checked import OutOfRangeError, number, numbers
from batchshaping.report.family import Curve, View
from batchshaping.report.texts import plotly_text
from batchshaping.training.config import SMALL_IMAGE_NETWORKS, RunConfig

__all__ = ["ChannelGating", "KINDS", "prior_masses"]


class ChannelGating:
    """The family of ``batchshaping.channel_gating``; see :class:`~batchshaping.report.family.Family`."""

    name = "channel_gating"
    nouns = ("ungated run", "gated run")
    explanation = (
        "A gate is always on if it is open for every test image, always off if for none, "
        "and conditional otherwise."
    )
    compared: Collection[str] = ("network", "width", "stem_stride", "inner")
    curves: Sequence[Curve] = (
        Curve("ungated", "ungated", "circle", reference=True),
        Curve("L0 only", "penalty-only", "diamond"),
        Curve("batch-shaping", "shaped", "square"),
    )
    words: Mapping[str, Callable[[Any], str]] = {
        "gated": lambda gated: "gates" if gated else "ungated",
        "shaping": lambda weight: f"batch shaping {weight:.12g}" if weight else "no batch shaping",
        "budget": lambda share: f"budget {100 * share:.12g}%",
        "network": str,
        "width": lambda channels: f"width {channels}",
        "gates_per_layer": lambda gates: f"{gates} gates a layer" if gates else "a gate a channel",
        "prior": lambda prior: "prior Beta({:.12g}, {:.12g})".format(*prior),
        "penalized": lambda what: f"{what.replace('-', ' ')} penalized",
    }

    def idle(self, config: Mapping[str, Any]) -> Collection[str]:
        of_small_networks = (
            () if config.get("network") in [*SMALL_IMAGE_NETWORKS] else ("width", "stem_stride", "inner")
        )
        return of_small_networks if config.get("gated", True) else (*of_small_networks, *_OF_GATES)

    def view(self, result: Mapping[str, Any]) -> View:
        config, gates = result["config"], _gates(result["gates"])
        ungated, penalty_only, shaped = self.curves
        curve = (shaped if config["shaping"] else penalty_only) if gates else ungated
        return View(
            curve=curve,
            shares={head: gates[share] for head, share in _COLUMNS.items()} if gates else {},
            pictures=_pictures(result),
            texts={
                "gates": gates,
                "least_median_most": _least_median_most(result["quantiles"]),
                "images": {which: [_image(image) for image in result[which]] for which in ("least", "most")},
            },
        )


_OF_GATES = {
    *("budget", "gate_bias", "gate_learning_rate", "gates_per_layer", "hidden", "noise_end", "penalized"),
    *("penalty", "penalty_begin", "penalty_end", "prior", "shaping", "shaping_end"),
}
"""Settings that have no effect on a network without gates."""

_COLUMNS = {"Conditional": "conditional", "Always on": "always_on", "Always off": "always_off"}

_SHARES = ("always_on", "conditional", "always_off", "mean_open")


def prior_masses(prior: Sequence[float], bins: int) -> list[float]:
    """The mass of a Beta prior in each of some bins of equal width over [0, 1].

    Args:
        prior: the two concentrations.
        bins: how many there are.

    Example:
        >>> [round(mass, 3) for mass in prior_masses((0.6, 0.4), bins=4)]
        [0.234, 0.15, 0.167, 0.449]
    """
    # The density may be infinite at the ends; the mass of a bin is not.
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.double)
    a, b = prior
    masses: list[float] = Beta(a, b).cdf(edges).diff().tolist()
    return masses


def _gates(gates: Mapping[str, float] | None) -> dict[str, float]:
    """Shares of gates by what they do; none for a network without gates."""
    return {share: number(gates[share]) for share in _SHARES} if gates else {}


def _pictures(result: Mapping[str, Any]) -> dict[str, Any]:
    layers = [_layer(layer) for layer in result["layers"]]
    bins = len(layers[0]["histogram"]) if layers else 0
    if bins > _MOST_BINS:
        raise OutOfRangeError(f"{bins} bins in a histogram")
    pictures = {
        "layers": layers,
        "prior": prior_masses(_prior(result["config"]), bins) if layers else [],
        "epochs": [_epoch(epoch) for epoch in result["history"]],
        "classes": [_class(each) for each in result["by_class"]],
    }
    if not pictures["classes"]:
        raise ValueError("no classes")
    return pictures


# Training writes histograms of 20 bins.
_MOST_BINS = 1000


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": str(layer["name"]),
        **{name: number(layer[name]) for name in ("gates", *_SHARES)},
        "histogram": numbers(layer["histogram"]),
        **_name(layer["name"]),
    }


def _epoch(epoch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "epoch": number(epoch["epoch"]),
        **{weight: number(epoch[weight]) for weight in ("shaping", "penalty", "noise")},
        "gates": _gates(epoch["gates"]),
        "histograms": [numbers(layer["histogram"]) for layer in epoch["layers"]],
    }


def _class(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_name(metrics["name"]),
        **{name: number(metrics[name]) for name in ("examples", "accuracy", "multiply_adds")},
        "open": [numbers(layer) for layer in metrics["open"]],
    }


def _prior(config: Mapping[str, Any]) -> tuple[float, float]:
    """The prior of a run, in the range that a run may have."""
    try:
        prior: tuple[float, float] = RunConfig(prior=config["prior"]).objective.prior
    except ValueError as error:
        raise OutOfRangeError(error) from None
    return prior


def _name(name: str) -> dict[str, str]:
    """A name as it stands beside an axis, and in the text of a point."""
    return {"label": plotly_text(name, 18), "hover": plotly_text(name, 60)}


def _least_median_most(quantiles: Sequence[float]) -> tuple[float, float, float]:
    return number(quantiles[0]), number(quantiles[len(quantiles) // 2]), number(quantiles[-1])


def _image(image: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: str(image[name]) for name in ("label", "predicted", "png")}
    return {**shown, "multiply_adds": number(image["multiply_adds"])}


KINDS = tuple(curve.name for curve in ChannelGating.curves)
"""What a run can be, in the order of the legend."""
