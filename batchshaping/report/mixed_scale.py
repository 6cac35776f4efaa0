"""Runs of vision transformers with tokens of two scales: which regions are fine, and for which images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from batchshaping.report.checked import OutOfRangeError, number, numbers
from batchshaping.report.family import Curve, View

__all__ = ["MixedScale"]


class MixedScale:
    """The family of ``batchshaping.mixed_scale``; see :class:`~batchshaping.report.family.Family`."""

    name = "mixed_scale"
    nouns = ("all-fine run", "mixed-scale run")
    explanation = (
        "Fine is the mean share of regions that are fine. Where the test images know their objects, found is "
        "the probability that the gate of a region with an object is more open than that of one without."
    )
    compared: Collection[str] = ("network", "patch", "embedding", "depth", "heads")
    curves: Sequence[Curve] = (
        Curve("all fine", "ungated", "circle", reference=True),
        Curve("chance", "by-chance", "triangle-up"),
        Curve("entropy of pixels", "by-entropy", "triangle-up"),
        Curve("token penalty", "penalty-only", "diamond"),
        Curve("batch-shaping", "shaped", "square"),
        Curve("learned priors", "learned-priors", "square"),
    )
    words: Mapping[str, Callable[[Any], str]] = {
        "gated": lambda gated: "two scales" if gated else "all fine",
        "gate": {
            "learned": "a learned gate",
            "entropy": "entropy of pixels",
            "chance": "chance",
        }.__getitem__,
        "density": lambda share: "no density" if share is None else f"{100 * share:.12g}% fine",
        "hyperprior": lambda pair: (
            "one prior for all regions" if pair is None else "hyperprior Beta({:.12g}, {:.12g})".format(*pair)
        ),
        "shaping": lambda weight: f"batch shaping {weight:.12g}" if weight else "no batch shaping",
        "penalty": lambda weight: f"penalty {weight:.12g}" if weight else "no penalty",
        "budget": lambda share: f"budget {100 * share:.12g}%",
        "network": str,
        "prior": lambda prior: "prior Beta({:.12g}, {:.12g})".format(*prior),
        "penalized": lambda what: f"{what.replace('-', ' ')} penalized",
    }

    def idle(self, config: Mapping[str, Any]) -> Collection[str]:
        if not config.get("gated", True):
            return _OF_GATES
        if config.get("gate", "learned") != "learned":
            return _OF_GATES - {"gate", "density", "coarse_side"}
        idle: set[str] = set()
        if not config.get("shaping"):
            idle |= {*_OF_LEARNED_PRIORS, "hyperprior", "prior", "shaping_end"}
        if not config.get("penalty"):
            idle |= {"budget", "penalized", "penalty_begin", "penalty_end"}
        return idle | ({"prior"} if config.get("hyperprior") else _OF_LEARNED_PRIORS)

    def view(self, result: Mapping[str, Any]) -> View:
        config = result["config"]
        if not config["gated"]:
            return View(self.curves[0], pictures=_no_pictures(result), texts={"regions": None})
        regions = result["regions"]
        found = _found(regions, result)
        shares = {"Fine": found["fine_share"]}
        if found["auc"] is not None:
            shares["Found"] = found["auc"]
        return View(
            curve=self._curve(config),
            shares=shares,
            pictures={
                "grid": found["grid"],
                "maps": found["maps"],
                "epochs": [_epoch(epoch) for epoch in result["history"]],
            },
            texts={
                "regions": found,
                "images": {
                    which: [
                        _image(image, mask, found["grid"])
                        for image, mask in zip(result[which], regions["masks"][which], strict=True)
                    ]
                    for which in ("least", "most")
                },
            },
        )

    def _curve(self, config: Mapping[str, Any]) -> Curve:
        _, chance, entropy, penalty, shaped, learned = self.curves
        if config["gate"] != "learned":
            return {"chance": chance, "entropy": entropy}[config["gate"]]
        if not config["shaping"]:
            return penalty
        return learned if config["hyperprior"] else shaped


_OF_LEARNED_PRIORS = {"hyperprior_weight", "temperature_weight", "prior_learning_rate"}

_OF_GATES = {
    *("budget", "coarse_side", "density", "gate", "gate_bias", "gate_learning_rate", "noise_end"),
    *("penalized", "penalty", "penalty_begin", "penalty_end", "scale_hidden", "scale_layers"),
    *("hyperprior", "prior", "shaping", "shaping_end", *_OF_LEARNED_PRIORS),
}
"""Settings that have no effect on a network whose regions are all fine."""

_MOST_REGIONS = 10_000


def _no_pictures(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"grid": [], "maps": [], "epochs": [_epoch(epoch) for epoch in result["history"]]}


def _found(regions: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Where regions are fine, and what is known of objects and priors there."""
    down, across = numbers(regions["grid"])
    if not 0 < down * across <= _MOST_REGIONS or down != int(down) or across != int(across):
        raise OutOfRangeError(f"a grid of {down} x {across} regions")
    examples = [number(each["examples"]) for each in result["by_class"]]
    fine = np.average([numbers(each["open"][0]) for each in result["by_class"]], axis=0, weights=examples)
    maps = {"Fine": fine.tolist()}
    priors, objects = result.get("priors"), regions["objects"]
    if priors is not None:
        maps["Learned prior mean"] = numbers(priors["mean"])
    if objects is not None:
        maps["Has an object"] = numbers(objects["frequency"])
    if any(len(values) != down * across for values in maps.values()):
        raise ValueError("a map must have a value for each region")
    both = [maps.get("Learned prior mean"), maps.get("Has an object")]
    return {
        "grid": [int(down), int(across)],
        "fine_share": number(result["gates"]["mean_open"]),
        "auc": None if objects is None else number(objects["auc"]),
        "correlation": None if None in both else _correlation(*both),
        "maps": [
            {"name": name, "rows": np.reshape(values, (int(down), int(across))).tolist()}
            for name, values in maps.items()
        ],
    }


def _correlation(one: Any, other: Any) -> float | None:
    """Pearson's correlation, None where one does not vary."""
    if np.std(one) == 0 or np.std(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def _epoch(epoch: Mapping[str, Any]) -> dict[str, Any]:
    gates = epoch["gates"]
    return {
        "epoch": number(epoch["epoch"]),
        "fine": number(gates["mean_open"]) if gates else None,
        **{weight: number(epoch[weight]) for weight in ("shaping", "penalty", "noise")},
    }


def _image(image: Mapping[str, Any], mask: Any, grid: Sequence[int]) -> dict[str, Any]:
    """An image, with the squares of its coarse regions in units of regions."""
    if len(mask) != grid[0] * grid[1]:
        raise ValueError("a mask must have a value for each region")
    shown = {name: str(image[name]) for name in ("label", "predicted", "png")}
    squares = [divmod(region, grid[1]) for region, fine in enumerate(numbers(mask)) if not fine]
    return {**shown, "multiply_adds": number(image["multiply_adds"]), "coarse": squares, "grid": [*grid]}
