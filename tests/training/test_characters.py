"""Characters of many fonts: what is drawn is what its label says, as often in every font."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from scripts import load_script

from batchshaping.training.data import ImagesInMemory, load_data
from batchshaping.training.data.dataset import data_in_memory
from batchshaping.training.sections import DataSettings

ROOT = Path(__file__).parents[2]
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
LETTERS = ("I", "H", "O", "L")


@pytest.fixture
def characters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with fonts that come with matplotlib."""
    script = load_script(ROOT / "benchmarks" / "ablation" / "characters.py")
    names = ("DejaVuSans.ttf", "DejaVuSansMono.ttf", "DejaVuSans-Bold.ttf")
    monkeypatch.setattr(script, "PACKAGES", {f"package of {name}": name for name in names})
    monkeypatch.setattr(script, "TEST_FONTS", 1)
    monkeypatch.setattr(script, "TRAIN_IMAGES", 160)
    monkeypatch.setattr(script, "TEST_IMAGES", 80)
    return script


def test_the_images_of_a_label_show_its_character(
    characters: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(characters, "characters_of", lambda fonts, count: LETTERS[:count])
    characters.write(tmp_path, 4, characters.fonts_in(FONTS))
    data = load_data(DataSettings(data="idx", data_folder=tmp_path))
    assert data.shape == (1, 28, 28) and data.classes == ("0", "1", "2", "3")
    for images, count in ((data.train, 160), (data.test, 80)):
        pixels, labels = images.__getitems__(range(len(images)))
        assert labels.bincount().tolist() == [count // 4] * 4
        shown = np.stack([pixels[labels == label].double().mean(dim=0)[0].numpy() for label in range(4)])
        clean = []
        for letter in LETTERS:
            canvas = Image.new("L", (28, 28))
            font = ImageFont.truetype(str(FONTS / "DejaVuSans.ttf"), 22)
            ImageDraw.Draw(canvas).text((14, 14), letter, fill=255, font=font, anchor="mm")
            clean.append(np.asarray(canvas))
        alike = np.corrcoef(shown.reshape(4, -1), np.stack(clean).reshape(4, -1))[:4, 4:]
        assert alike.argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_images_are_always_the_same_and_differ_from_one_another(characters: ModuleType) -> None:
    fonts = characters.fonts_in(FONTS)
    drawn, again, other = (characters.draw(LETTERS, fonts, 24, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(drawn, again)
    assert not np.array_equal(drawn, other)
    assert len(np.unique(drawn.reshape(24, -1), axis=0)) == 24


def test_what_is_written_is_not_drawn_again(
    characters: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(characters, "characters_of", lambda fonts, count: LETTERS[:count])
    characters.write(tmp_path, 4, characters.fonts_in(FONTS))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 4
    characters.write(tmp_path, 4, [])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_half_of_the_images_of_two_kinds_are_clothes_whose_classes_come_first(
    characters: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(characters, "characters_of", lambda fonts, count: LETTERS[:count])
    characters.write(tmp_path / "drawn", 4, characters.fonts_in(FONTS))
    # What is worn in class k is k everywhere.
    labels = torch.arange(300) % 3
    worn = ImagesInMemory(labels.byte()[:, None, None, None].expand(-1, 1, 28, 28), labels)
    clothes = data_in_memory(worn, worn, "abc", padding=2, flip=True)
    characters.write_with_clothes(tmp_path / "mixed", tmp_path / "drawn", clothes)
    drawn, mixed = (load_data(DataSettings(data="idx", data_folder=tmp_path / n)) for n in ("drawn", "mixed"))
    assert mixed.classes == tuple("0123456")
    for part, source, count in ((mixed.train, drawn.train, 160), (mixed.test, drawn.test, 80)):
        images, labels = part.__getitems__(range(len(part)))
        assert len(labels) == count and (labels < 3).sum() == count // 2
        assert (images[labels < 3] == labels[labels < 3].reshape(-1, 1, 1, 1)).all()
        pixels, of_drawn = source.__getitems__(range(len(source)))
        known = {(p.numpy().tobytes(), int(k) + 3) for p, k in zip(pixels, of_drawn, strict=True)}
        chosen = [(p.numpy().tobytes(), int(k)) for p, k in zip(images, labels, strict=True) if k >= 3]
        assert len({*chosen}) == count // 2 and {*chosen} <= known
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mixed").iterdir()}
    characters.write_with_clothes(tmp_path / "mixed", tmp_path / "missing", clothes)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mixed").iterdir()} == before


def test_missing_fonts_and_too_many_classes_are_refused_in_one_line(
    characters: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"^expected the fonts .* package of DejaVuSans.ttf package of [^\n]*$"
    ):
        characters.fonts_in(tmp_path)
    with pytest.raises(ValueError, match=r"^classes must be at most 0, received 3$"):  # none has Chinese ones
        characters.characters_of(characters.fonts_in(FONTS), 3)
