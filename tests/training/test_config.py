"""A configuration is the same from code, a file and a command line; what is wrong with one fits in a line."""

from __future__ import annotations

import copy
import json
import pickle
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from batchshaping.storage.files import quoted
from batchshaping.training.config import (
    DATASETS,
    IMAGENET_NETWORKS,
    NETWORKS,
    SECTIONS,
    SETTINGS,
    SMALL_IMAGE_NETWORKS,
    RunConfig,
    read_config,
    read_whole_config,
    write_config,
)
from batchshaping.training.networks import FAMILIES
from batchshaping.training.networks.gated_resnet import GatedResNet
from batchshaping.training.networks.msvit import MixedScaleViT
from batchshaping.training.schedules import Ramp, Steps
from batchshaping.training.sections import MachineSettings

CONFIGS = Path(__file__).parents[2] / "configs"

shares = st.floats(0, 1)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
not_negative = st.floats(0, allow_infinity=False)
concentrations = st.floats(0, 1e5, exclude_min=True)
counts = st.integers(1, 10**6)
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "network": st.sampled_from(NETWORKS),
    "width": counts,
    "stem_stride": st.integers(1, 2),
    "inner": st.floats(0, 1, exclude_min=True),
    "pretrained": st.booleans(),
    "gated": st.booleans(),
    "hidden": counts,
    "gates_per_layer": st.none() | counts,
    "gate_bias": st.floats(allow_nan=False, allow_infinity=False),
    "patch": counts,
    "embedding": counts,
    "depth": counts,
    "heads": counts,
    "coarse_side": st.sampled_from([2, 4]),
    "gate": st.sampled_from(["learned", "entropy", "chance"]),
    "density": shares,
    "scale_hidden": counts,
    "scale_layers": counts,
    "data": st.sampled_from(DATASETS),
    "data_folder": st.none() | text.map(Path),
    "download": st.booleans(),
    "image_size": counts,
    "train_images": st.none() | counts,
    "evaluate_on": st.sampled_from(["test", "validation"]),
    "augment": st.booleans(),
    "workers": st.integers(0, 64),
    "budget": shares,
    "penalty": not_negative,
    "penalty_begin": shares,
    "penalty_end": shares,
    "penalized": st.sampled_from(["multiply-adds", "open-gates"]),
    "shaping": not_negative,
    "shaping_end": st.none() | st.floats(0, 1, exclude_min=True),
    "prior": st.tuples(concentrations, concentrations),
    "hyperprior": st.none() | st.tuples(concentrations, concentrations),
    "hyperprior_weight": not_negative,
    "temperature_weight": not_negative,
    "noise_end": st.none() | st.floats(0, 1, exclude_min=True),
    "start": st.none() | text.filter(lambda source: source not in ("none", "null")),
    "start_sha256": st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    "teacher": st.none() | text.filter(lambda source: source not in ("none", "null")),
    "teacher_sha256": st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    "teacher_weight": shares,
    "teacher_temperature": positive,
    "epochs": counts,
    "batch_size": counts,
    "accumulate": st.integers(1, 8),
    "learning_rate": positive,
    "gate_learning_rate": positive,
    "prior_learning_rate": st.none() | positive,
    "optimizer": st.sampled_from(["sgd", "adamw"]),
    "schedule": st.sampled_from(["steps", "cosine"]),
    "milestones": st.lists(shares, max_size=4).map(tuple),
    "momentum": st.floats(0, 1, exclude_max=True),
    "weight_decay": not_negative,
    "accelerator": st.sampled_from(["auto", "cpu", "gpu"]),
    "devices": st.integers(1, 8),
    "nodes": st.integers(1, 8),
    "threads": st.none() | st.integers(1, 1024),
    "precision": st.sampled_from(["32", "16-mixed", "bf16-mixed", "64"]),
    "sync_batch_norm": st.booleans(),
    "recalibrate": st.booleans(),
    "channels_last": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
    "evaluate_every": counts,
    "logger": st.sampled_from(["csv", "tensorboard", "none"]),
    "log_every": counts,
}
"""What each setting can be, written down a second time."""


DEFAULT_SETTINGS = RunConfig().model_dump()
NETWORK_WITH = {name: family.names[0] for family in FAMILIES for name in family.settings()}
"""A network that has each setting of networks."""
SETTINGS_OF_NETWORKS = {name for family in FAMILIES for name in family.settings()}


def consistent(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings, but for those that do not go together."""
    begin, end = sorted((settings["penalty_begin"], settings["penalty_end"]))
    settings |= {"penalty_begin": begin, "penalty_end": end} if begin < end else {}
    if not begin < end:
        settings |= {"penalty_begin": 0.25, "penalty_end": 0.5}
    family = next(family for family in FAMILIES if settings["network"] in family.names)
    defaults = {name: field.default for name, field in family.settings().items()}
    if settings["network"] in (*SMALL_IMAGE_NETWORKS, "msvit-mini"):
        ignored = {"pretrained"}
    else:
        ignored = {"width", "stem_stride", "inner", "patch", "embedding", "depth", "heads"}
    of_others = SETTINGS_OF_NETWORKS - defaults.keys()
    settings = {name: value for name, value in settings.items() if name not in of_others}
    settings |= {name: default for name, default in defaults.items() if name in ignored}
    if settings.get("gate") == "learned":
        settings["density"] = None
    if settings.get("pretrained"):
        settings["start"] = None
    elif settings["start"] is None:
        settings["start_sha256"] = None
    if settings["teacher"] is None:
        settings["teacher_sha256"] = None
    parts = settings["accumulate"] * settings["devices"] * settings["nodes"]
    return settings | {"batch_size": (settings["batch_size"] + 1) * parts}


every_setting = st.fixed_dictionaries(FIELDS).map(consistent)


def refused(**settings: Any) -> str:
    """The one line with which settings are refused."""
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        RunConfig(**settings)
    return str(error.value)


# Round trips


@given(settings=every_setting)
def test_a_configuration_comes_back_from_its_file(
    settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert FIELDS.keys() == SETTINGS.keys()
    config = RunConfig(**settings)
    assert config.model_dump() == settings
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    write_config(config, path)
    assert read_config(path) == read_whole_config(path) == config
    assert RunConfig(**config.model_dump(mode="json")) == config


@given(settings=every_setting)
def test_text_from_a_command_line_gives_the_same_configuration(settings: dict[str, Any]) -> None:
    as_text = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in settings.items()
        if value is not None and value != ()
    }
    if settings["noise_end"] is None:
        as_text["noise_end"] = "none"
    # What has no text, on the command line stays as it is by default.
    expected = {name: value for name, value in settings.items() if name in as_text}
    assert RunConfig(**as_text) == RunConfig(**expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prior": "0.6,0.4"}, (0.6, 0.4)),
        ({"prior": "2, 6"}, (2.0, 6.0)),
        ({"milestones": "0.3,0.6,0.9"}, (0.3, 0.6, 0.9)),
        ({"milestones": "0.5"}, (0.5,)),
        ({"noise_end": "none"}, None),
        ({"noise_end": "0.3"}, 0.3),
        ({"budget": "0.3"}, 0.3),
        ({"train_images": "128"}, 128),
        ({"seed": "3"}, 3),
        ({"threads": "2"}, 2),
        ({"threads": "none"}, None),
    ],
)
def test_text_becomes_what_is_meant(settings: dict[str, str], expected: object) -> None:
    (name,) = settings
    assert getattr(RunConfig(**settings), name) == expected


def test_settings_replace_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("network: resnet20\nbudget: 0.2\n")
    assert read_config(path, budget="0.3") == RunConfig(network="resnet20", budget=0.3)
    path.write_text("")
    assert read_config(path) == RunConfig()


@given(settings=every_setting)
def test_the_batch_is_shared_out_without_a_rest(settings: dict[str, Any]) -> None:
    config = RunConfig(**settings)
    parts = config.devices * config.nodes * config.accumulate
    assert config.batch_of_a_device * parts == config.batch_size and config.batch_of_a_device > 1


# Sections


@given(settings=every_setting)
def test_a_configuration_is_its_sections(settings: dict[str, Any]) -> None:
    config = RunConfig(**settings)
    sections = {name: getattr(config, name) for name in SECTIONS}
    assert RunConfig(**sections) == config
    for name, section in sections.items():
        others = {n: value for n, value in settings.items() if SETTINGS[n].section != name}
        assert RunConfig(**{name: section}, **others) == config
        assert type(section)(**section.model_dump()) == section
        assert section.model_dump() == {n: settings[n] for n in settings if SETTINGS[n].section == name}
    assert (config.network.name, config.data.name) == (settings["network"], settings["data"])


@given(settings=every_setting)
def test_settings_are_read_by_their_names_whichever_section_they_are_in(settings: dict[str, Any]) -> None:
    config = RunConfig(**settings)
    for name in settings.keys() - SECTIONS.keys():
        assert getattr(config, name) == settings[name]
    with pytest.raises(AttributeError, match="spam"):
        getattr(config, "spam")  # noqa: B009


@given(settings=every_setting, name=st.sampled_from(sorted(FIELDS)))
def test_a_copy_has_other_settings_where_they_are_given(settings: dict[str, Any], name: str) -> None:
    # Without the network, settings of another family would be left.
    assume(name in settings and (name != "network" or settings["network"] in GatedResNet.names))
    try:
        config = RunConfig(**{**settings, name: SETTINGS[name].default})
    except ValueError:  # another setting needs it
        reject()
    assert config.model_copy() == config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    try:
        expected = RunConfig(**settings)
    except ValueError:
        return
    assert config.model_copy(update={name: settings[name]}) == expected
    section = SETTINGS[name].section
    assert config.model_copy(update={section: getattr(expected, section)}) == expected


def test_a_copy_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^epochs: "):
        RunConfig().model_copy(update={"epochs": 0})
    with pytest.raises(ValueError, match=r"^there is no setting 'spam'; "):
        RunConfig().model_copy(update={"spam": 0})


def test_a_part_of_the_settings_is_written_by_their_names() -> None:
    config = RunConfig(seed=3, network="resnet14")
    assert config.model_dump(exclude_defaults=True) == {"network": "resnet14", "seed": 3}
    assert config.model_dump(include={"seed", "epochs"}) == {"epochs": 40, "seed": 3}
    assert config.model_dump().keys() - config.model_dump(exclude={"seed"}).keys() == {"seed"}
    assert json.loads(config.model_dump_json()) == config.model_dump(mode="json")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"machine": MachineSettings(), "nodes": 2},
            "nodes is a setting of the section machine, received both",
        ),
        ({"data": MachineSettings()}, "data: input should be "),
        ({"epochs": MachineSettings()}, "epochs: input should be "),
        ({"machine": {"nodes": 2}}, "there is no setting 'machine'; "),
        ({"data": {"data": "digits"}}, "data: input should be "),
    ],
)
def test_sections_that_are_none_are_refused(settings: dict[str, Any], line: str) -> None:
    assert refused(**settings).startswith(line)


# What is refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("network", value) for value in ("resnet9", "ResNet8", "", "a\nb", None, 8)],
        *[("data", value) for value in ("mnist", "", 3)],
        *[("width", value) for value in (0, -1, 1.5, "wide", "a\nb")],
        *[("stem_stride", value) for value in (0, 3)],
        *[("inner", value) for value in (0, 1.1, float("nan"))],
        *[("gated", value) for value in ("perhaps", 2)],
        *[(share, value) for share in ("budget", "penalty_begin") for value in (-0.1, 1.1, float("nan"))],
        *[("penalty", value) for value in (-1, float("inf"), float("nan"))],
        *[("penalized", value) for value in ("flops", "")],
        *[("shaping_end", value) for value in (0, 1.5)],
        *[("noise_end", value) for value in (0, 1.5, "never")],
        *[("prior", value) for value in ((0.6,), (0.6, 0.4, 0.1), 0.6)],
        *[(name, True) for name, setting in SETTINGS.items() if not setting.is_flag],
        *[("epochs", value) for value in (0, -1, "many", None)],
        *[("train_images", value) for value in (0, -1, "some")],
        *[("accumulate", value) for value in (0, "2.5")],
        *[("learning_rate", value) for value in (0, -0.1, float("inf"), float("nan"), "fast")],
        *[("schedule", value) for value in ("linear", "")],
        *[("momentum", value) for value in (1, -0.1)],
        *[("precision", value) for value in ("16", "8", "double")],
        *[("devices", value) for value in (0, "two")],
        *[("threads", value) for value in (0, 1025, "all")],
        *[("seed", value) for value in (-1, 2**32, 0.5)],
        *[("logger", value) for value in ("wandb", "")],
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name(name: str, value: object) -> None:
    others = {} if name in DEFAULT_SETTINGS else {"network": NETWORK_WITH[name]}
    line = refused(**others, **{name: value})
    assert line.startswith(name)
    assert line.endswith(f", received {value!r}")


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("prior", (0.6, 0), "prior.1: "),
        ("prior", (0.6, 1e18), "prior.1: "),
        ("prior", "a,0.4", "prior.0: "),
        ("prior", "0.6", "prior.1: "),
        ("milestones", (0.5, 1.5), "milestones.1: "),
    ],
)
def test_one_number_of_several_is_named(name: str, value: object, part: str) -> None:
    assert refused(**{name: value}).startswith(part)


@given(name=text.filter(lambda name: name not in {*SETTINGS, *SECTIONS}))
def test_an_unknown_setting_is_refused_with_those_there_are(name: str) -> None:
    line = refused(**{name: 1})
    assert line.startswith(f"there is no setting {quoted(name)}; ")
    assert all(known in line for known in SETTINGS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"penalty_begin": 0.6, "penalty_end": 0.2}, ["penalty_begin", "penalty_end", "0.6", "0.2"]),
        ({"penalty_begin": 0.5, "penalty_end": 0.5}, ["penalty_begin", "penalty_end", "0.5"]),
        ({"batch_size": 63, "devices": 2}, ["batch_size", "devices", "2", "63"]),
        ({"batch_size": 12, "devices": 2, "nodes": 2, "accumulate": 2}, ["batch_size", "nodes", "8", "12"]),
        # Batch normalization needs two images.
        ({"batch_size": 1}, ["batch_size", "1"]),
        ({"batch_size": 4, "accumulate": 4}, ["batch_size", "accumulate", "4"]),
        ({"network": "resnet8", "pretrained": True}, ["pretrained", "resnet8"]),
        ({"network": "resnet18", "width": 8}, ["width", "resnet18"]),
        ({"network": "resnet50", "stem_stride": 2}, ["stem_stride", "resnet50"]),
        ({"network": "resnet18", "pretrained": True, "start": "run"}, ["start", "pretrained", "run"]),
        ({"start_sha256": "0" * 64}, ["start_sha256", "none"]),
        ({"start": "run", "start_sha256": "0" * 63}, ["start_sha256", "pattern"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], words: list[str]) -> None:
    line = refused(**settings)
    assert all(word in line for word in words), line


def test_a_configuration_does_not_change() -> None:
    config = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.budget = 0.1


@pytest.mark.parametrize(
    "content",
    [
        b"network: resnet9",
        b"spam: 1",
        b"budget: -1",
        b"- network",
        b"resnet8",
        b"3",
        b"1: 2",
        b"network: [",
        b"\tnetwork: resnet8",
        b"network: !!python/object/apply:os.getcwd []",
        b"\xff\xfe\x00",
        b"network: resnet8\0",
        b"epochs: " + b"1" * 5000,
        b"[" * 5000,
    ],
    ids=lambda content: repr(content[:30]),
)
def test_what_is_no_configuration_is_refused_with_the_name_of_the_file(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["missing.yaml", ""])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(No such file|Is a directory)") as error:
        read_config(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: ")


def yaml_refused(text: str, path: Path) -> str:
    """The one line with which a file is refused, without its name."""
    path.write_text(text)
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        read_config(path)
    line = str(error.value).partition("; there are ")[0]
    assert line.startswith(f"{path}: ") and len(line) < len(str(path)) + 300
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    "number",
    [
        *("010", "-010", "+07", "0x1F", "0XFF", "0b101", "0o17", "1_000", "1_0.5", "1:30", "1:30:00"),
        *("true", "yes", "on", ".inf", ".nan", "1e999", "9" * 18, "9" * 400, "9" * 5000, "2.5", "null", "''"),
    ],
    ids=lambda number: number[:20],
)
def test_a_number_that_is_read_in_different_ways_is_refused_with_its_setting(
    number: str, tmp_path: Path
) -> None:
    line = yaml_refused(f"epochs: {number}\nnetwork: resnet8\n", tmp_path / "run.yaml")
    assert line.startswith("epochs")


@pytest.mark.parametrize("prior", ["[true, 0.4]", "[0.6, 010]", "[0.6, 1_0]", "[[0.6], 0.4]", "{a: 1}"])
def test_a_number_in_a_list_is_refused_with_its_setting(prior: str, tmp_path: Path) -> None:
    assert yaml_refused(f"prior: {prior}\n", tmp_path / "run.yaml").startswith("prior")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: 5e-4", {"learning_rate": 5e-4}),
        ("learning_rate: 1e-05", {"learning_rate": 1e-5}),
        ("learning_rate: .5", {"learning_rate": 0.5}),
        ("epochs: 3", {"epochs": 3}),
        ("epochs: +3", {"epochs": 3}),
        ("epochs: '3'", {"epochs": 3}),
        ("epochs: 1e2", {"epochs": 100}),
        ("gated: yes", {"gated": True}),
        ("gated: off", {"gated": False}),
        ("gated: False", {"gated": False}),
        ("noise_end: ~", {"noise_end": None}),
        ("noise_end:", {"noise_end": None}),
        ("precision: 64", {"precision": "64"}),
        ("prior: [2, 6]", {"prior": (2.0, 6.0)}),
        ("prior:\n- 2\n- 6", {"prior": (2.0, 6.0)}),
        ("data_folder: 2020-13-45", {"data_folder": Path("2020-13-45")}),
        ("data_folder: 12:30", {"data_folder": Path("12:30")}),
        ("data_folder: '010'", {"data_folder": Path("010")}),
        ("\ufeffepochs: 3", {"epochs": 3}),
        ("{epochs: 3, seed: 1}", {"epochs": 3, "seed": 1}),
        ("--- # a comment\nepochs: 3\n...\n", {"epochs": 3}),
    ],
)
def test_what_is_plain_is_read(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_config(path) == RunConfig(**expected)


@pytest.mark.parametrize(
    "folder",
    [
        "1e5",
        "010",
        "0x1F",
        "1_000",
        "1:30",
        "2020-01-01",
        "true",
        "yes",
        "null",
        "~",
        "",
        ".inf",
        "a: b",
        "#",
    ],
)
def test_a_folder_whose_name_looks_like_something_else_comes_back(folder: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    config = RunConfig(data_folder=Path(folder))
    write_config(config, path)
    # A folder of the name null cannot be told from none, here and on the command line.
    assert read_config(path) == (config if folder != "null" else RunConfig())


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\nseed: 1\nepochs: 4\n", "expected each setting once, received 'epochs' again in line 3"),
        ("{epochs: 3, 'epochs': 3}", "expected each setting once, received 'epochs' again in line 1"),
        (LAUGHS, "expected settings without anchors, received one in line 1"),
        ("epochs: &n 3\nseed: *n", "expected settings without anchors, received one in line 1"),
        ("seed: *n", "expected settings without anchors, received one in line 1"),
        ("epochs: !!int '010'", "expected settings without tags, received one in line 1"),
        ("<<: {epochs: 3}", "there is no setting '<<'"),
        ("epochs: " + "[" * 30 + "]" * 30, "epochs: "),
        ("epochs: " + "{a: " * 2000 + "}" * 2000, "expected a YAML file"),
        ("- " * 5000, "expected a YAML file"),
        ("[" + "1, " * 10_000 + "]", "expected settings as name: value, received [1, 1, 1"),
        ("x" * 10_000, "expected settings as name: value, received 'xxx"),
        ("network: " + "x" * 10_000, "network must be one of"),
        ("x" * 1000 + ": 1", "there is no setting 'xxx"),
        ("epochs: " + "x" * 10_000, "epochs: input should be a valid integer"),
        ("#" * 70_000, "expected settings in at most 65536 bytes, received more"),
        ("epochs: 3\n---\nepochs: 4\n", "expected a YAML file"),
    ],
    ids=lambda text: text[:20],
)
def test_what_makes_a_file_large_or_ambiguous_is_refused_in_a_short_line(
    text: str, message: str, tmp_path: Path
) -> None:
    assert yaml_refused(text, tmp_path / "run.yaml").startswith(message)


# Files of a run


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_config(RunConfig(epochs=10), path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"\A[^\n]*: expected [^\n]*\Z"):
            read_whole_config(path)


def test_a_bit_that_changes_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_config(RunConfig(epochs=10), path)
    whole = path.read_bytes()
    # All bits in turn would take long; this step comes to each place in a byte.
    for position in range(0, 8 * len(whole), 3):
        changed = bytearray(whole)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"\A[^\n]*config\.yaml: [^\n]*\Z"):
            read_whole_config(path)


# All settings that there were before files had a checksum.
BEFORE_CHECKSUMS = {
    *("network", "width", "stem_stride", "pretrained", "gated", "hidden", "gate_bias"),
    *("data", "data_folder", "download", "image_size", "train_images", "augment", "workers"),
    *("budget", "penalty", "penalty_begin", "penalty_end", "penalized"),
    *("shaping", "shaping_end", "prior", "noise_end"),
    *("epochs", "batch_size", "accumulate", "learning_rate", "gate_learning_rate"),
    *("schedule", "milestones", "momentum", "weight_decay"),
    *("accelerator", "devices", "nodes", "precision", "sync_batch_norm", "seed"),
    *("evaluate_every", "logger", "log_every"),
}


def without_mark(path: Path) -> list[str]:
    """A file as earlier versions wrote it: its lines."""
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    return lines[1:]


def test_a_file_of_an_earlier_version_must_have_the_settings_of_its_time(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config = RunConfig(prior=(0.5, 0.5), milestones=())
    write_config(config, path)
    lines = without_mark(path)
    assert read_whole_config(path) == config
    for number, line in enumerate(lines):
        name = line.partition(":")[0]
        if name in BEFORE_CHECKSUMS - {"prior", "milestones"}:
            path.write_text("".join(lines[:number] + lines[number + 1 :]))
            with pytest.raises(ValueError, match=rf"received none of {name}$"):
                read_whole_config(path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"received none of network, width, stem_stride and \d+ more$"):
        read_whole_config(path)


def test_a_setting_that_came_later_has_its_default_where_the_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"

    class Earlier(RunConfig):
        def model_dump(self, **settings: Any) -> dict[str, Any]:
            return super().model_dump(**settings, exclude={"log_every", "logger"})

    write_config(Earlier(epochs=3), path)
    assert read_whole_config(path) == RunConfig(epochs=3)


def test_a_file_that_cannot_be_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_config(RunConfig(), path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_config(RunConfig(seed=1), path)
    assert read_whole_config(path) == RunConfig() and len(list(tmp_path.iterdir())) == 1


# What there is to read


def test_every_setting_is_described_and_stands_under_a_heading() -> None:
    for name, setting in SETTINGS.items():
        assert setting.description.endswith(".") and setting.section in SECTIONS, name
    # Section by section, so that each heading stands once.
    sections = [section for section, _ in groupby(setting.section for setting in SETTINGS.values())]
    assert sections == list(SECTIONS) == list(RunConfig.model_fields)
    assert set(NETWORKS) == {*SMALL_IMAGE_NETWORKS, *IMAGENET_NETWORKS, *MixedScaleViT.names}


def ramps(config: RunConfig) -> tuple[Ramp, Ramp]:
    """The weights of the batch-shaping loss and of the penalty."""
    return (
        Ramp(config.shaping, 0.0, 0.0, config.shaping_end),
        Ramp(0.0, config.penalty, config.penalty_begin, config.penalty_end),
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*resnet*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_have_the_objective_of_the_paper(path: Path) -> None:
    config = read_config(path)
    assert config.gated and config.network.name in path.stem
    assert (config.penalized, config.budget, config.prior) == ("open-gates", 0.0, (0.6, 0.4))
    assert config.noise_end is None and config.hidden == 16
    gamma, lambda_ = ramps(config)
    for epoch, weight, share in [
        (0, 0.75, 0.0),
        (50, 0.375, 0.0),
        (100, 0.0, 0.0),
        (200, 0.0, 0.5),
        (300, 0.0, 1.0),
    ]:
        assert gamma(epoch / 500) == pytest.approx(weight)
        assert lambda_(epoch / 500) == pytest.approx(share * config.penalty)
    assert config.penalty > 0


def test_the_configuration_for_cifar_is_the_recipe_of_the_paper() -> None:
    config = read_config(CONFIGS / "cifar10_resnet20.yaml")
    assert (config.network.name, config.data.name, config.width, config.augment) == (
        "resnet20",
        "cifar10",
        16,
        True,
    )
    assert (config.epochs, config.batch_size, config.accumulate) == (500, 256, 1)
    assert (config.learning_rate, config.momentum, config.weight_decay) == (0.1, 0.9, 5e-4)
    assert config.schedule == "steps"
    rate = Steps(config.milestones)
    falls = [epoch for epoch in range(1, 500) if rate(epoch / 500) < rate((epoch - 1) / 500)]
    assert falls == [300, 375, 450]


def test_the_configuration_of_mixed_scale_tokens_has_what_the_paper_states() -> None:
    config = read_config(CONFIGS / "imagenet_msvit_small16.yaml")
    assert (config.network.name, config.coarse_side, config.scale_layers) == ("msvit-small16", 2, 4)
    assert config.hyperprior is not None and config.shaping > 0 and config.shaping_end is None
    assert config.epochs == 20 and config.penalty == 0 and config.gated and config.gate == "learned"
    assert config.start_from == "timm:deit_small_patch16_224"
    # The weights are of the network, and their images have the statistics that those of folders get.
    vit = timm.create_model("deit_small_patch16_224")
    network = config.network.ungated(1000, (3, 224, 224))
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (vit, network)]
    assert shapes[0] == shapes[1]
    assert vit.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_there_are_four_configurations() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {
        "cifar10_resnet20",
        "imagenet_msvit_small16",
        "imagenet_resnet34",
        "imagenet_resnet50",
    }


def test_a_file_from_before_there_were_checksums_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_config(RunConfig(epochs=3), path)
    settings = yaml.safe_load(path.read_text())
    path.write_text(yaml.dump({name: settings[name] for name in BEFORE_CHECKSUMS}))
    # What had no setting then was not done.
    assert read_whole_config(path) == RunConfig(epochs=3, teacher=None, recalibrate=False)
