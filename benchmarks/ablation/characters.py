"""Chinese characters in many fonts: data with as many classes as one likes, without a download.

``python benchmarks/ablation/characters.py --classes 1000`` draws the characters and writes them as IDX files,
which ``--data idx`` reads. Training images are drawn in other fonts than test images. Each is noisy, of its
own size, place, slant and contrast. There are as many images whatever the number of classes, and the first
characters of a larger set are those of a smaller one. ``from_trained.py`` also mixes them with the clothes of
Fashion-MNIST.

The fonts are files of Debian's packages, which this file lists; install them, or unpack them into a folder.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from batchshaping.storage.files import replaced
from batchshaping.training.data import Data, load_data
from batchshaping.training.sections import DataSettings

ROOT = Path(__file__).parent.parent.parent

PACKAGES = {
    "fonts-arphic-bsmi00lp": "bsmi00lp.ttf",
    "fonts-arphic-bkai00mp": "bkai00mp.ttf",
    "fonts-arphic-uming": "uming.ttc",
    "fonts-cwtex-fs": "cwfs.ttf",
    "fonts-cwtex-heib": "cwheib.ttf",
    "fonts-cwtex-yen": "cwyen.ttf",
    "fonts-droid-fallback": "DroidSansFallbackFull.ttf",
    "fonts-hanazono": "HanaMinA.ttf",
    "fonts-ipaexfont-mincho": "ipaexm.ttf",
    "fonts-klee": "KleeOne-Regular.ttf",
    "fonts-migmix": "migmix-1p-regular.ttf",
    "fonts-morisawa-bizud-mincho": "BIZUDMincho-Regular.ttf",
    "fonts-mplus": "Mplus1-Black.otf",
    "fonts-kiloji": "kiloji.ttf",
    "fonts-aoyagi-soseki": "aoyagi-soseki.ttf",
    "fonts-dotgothic16": "DotGothic16-Regular.ttf",
    "fonts-dejima-mincho": "dejima-mincho-r227.ttf",
    "fonts-horai-umefont": "ume-pgo5.ttf",
    "fonts-reggae": "ReggaeOne-Regular.ttf",
    "fonts-oradano-mincho-gsrr": "OradanoGSRR.ttf",
    "fonts-lxgw-wenkai": "LXGWWenKai-Regular.ttf",
    "fonts-noto-cjk": "NotoSansCJK-Regular.ttc",
    "fonts-konatu": "Konatu.ttf",
    "fonts-cns11643-sung": "TW-Sung-98_1.ttf",
    "fonts-kouzan-mouhitsu": "kouzan-mouhitsu.ttf",
}
"""Debian's packages with the font that is taken from each; test images are drawn in the last five."""
TEST_FONTS = 5
SIDE = 28
TRAIN_IMAGES, TEST_IMAGES = 40_000, 10_000
LAST = "t10k-labels-idx1-ubyte"
"""The file that is written last."""


def fonts_in(folder: Path) -> list[Path]:
    """The file of each font in a folder and those within, in the order of the packages.

    Raises:
        ValueError: in one line, if a font is missing.
    """
    files = {path.name: path for path in sorted(folder.rglob("*"))}
    if missing := [package for package, name in PACKAGES.items() if name not in files]:
        raise ValueError(
            f"expected the fonts of Debian's packages in {folder}, found none of {' '.join(missing)}"
        )
    return [files[name] for name in PACKAGES.values()]


def characters_of(fonts: Sequence[Path], count: int) -> list[str]:
    """Characters that all fonts have, in an order that is always the same.

    Raises:
        ValueError: in one line, if the fonts have fewer in common.
    """
    from fontTools.ttLib import TTFont

    codes = [set(TTFont(path, fontNumber=0, lazy=True).getBestCmap()) for path in fonts]
    common = sorted(set(range(0x4E00, 0xA000)).intersection(*codes))
    if count > len(common):
        raise ValueError(f"classes must be at most {len(common)}, received {count}")
    return [chr(common[i]) for i in np.random.default_rng(0).permutation(len(common))[:count]]


def draw(characters: Sequence[str], fonts: Sequence[Path], images: int, seed: int) -> NDArray[np.uint8]:
    """Images of shape (images, SIDE, SIDE), by font and then by character, as many of each."""
    random = np.random.default_rng(seed)
    times = images // (len(characters) * len(fonts))
    drawn = np.empty((len(fonts), len(characters), times, SIDE, SIDE), np.float32)
    for of_font, path in zip(drawn, fonts, strict=True):
        sizes = {size: ImageFont.truetype(str(path), 3 * size) for size in range(18, 27)}
        for of_character, character in zip(of_font, characters, strict=True):
            for image in of_character:
                image[:] = _one(character, sizes[int(random.integers(18, 27))], random)
    contrast = random.uniform(0.4, 1, (*drawn.shape[:3], 1, 1))
    noisy = 64 + 128 * contrast * drawn + random.normal(0, 20, drawn.shape)
    return noisy.clip(0, 255).astype(np.uint8).reshape(-1, SIDE, SIDE)


def _one(character: str, font: ImageFont.FreeTypeFont, random: np.random.Generator) -> NDArray[np.float32]:
    """One image in [0, 1], drawn three times as large, slanted, and made smaller."""
    canvas = Image.new("L", (3 * SIDE, 3 * SIDE))
    middle = (1.5 * SIDE + random.uniform(-4, 4), 1.5 * SIDE + random.uniform(-4, 4))
    ImageDraw.Draw(canvas).text(middle, character, fill=255, font=font, anchor="mm")
    slant, tilt = random.uniform(-0.2, 0.2, 2)
    moved = (1, slant, -slant * 1.5 * SIDE, tilt, 1, -tilt * 1.5 * SIDE)
    canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, moved, Image.Resampling.BILINEAR)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255


def labels_of(classes: int, fonts: int, images: int) -> NDArray[np.int16]:
    """The classes of the images that :func:`draw` gives."""
    of_font = np.arange(classes, dtype=np.int16).repeat(images // (classes * fonts))
    return np.tile(of_font, fonts)


def write(folder: Path, classes: int, fonts: Sequence[Path]) -> None:
    """Write the images and their classes as IDX files, where they are missing."""
    if (folder / LAST).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    characters = characters_of(fonts, classes)
    parts = {"train": (fonts[:-TEST_FONTS], TRAIN_IMAGES, 1), "t10k": (fonts[-TEST_FONTS:], TEST_IMAGES, 2)}
    for part, (of_part, images, seed) in parts.items():
        drawn = draw(characters, of_part, images, seed)
        _write_part(folder, part, drawn, labels_of(classes, len(of_part), images))


def write_with_clothes(folder: Path, drawn: Path, clothes: Data) -> None:
    """Write images of two kinds, where they are missing: as many as were drawn, half of them clothes.

    Args:
        folder: where the IDX files are written.
        drawn: the folder of the characters, whose labels come after those of the clothes.
        clothes: the images of Fashion-MNIST.
    """
    if (folder / LAST).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    characters = load_data(DataSettings(data="idx", data_folder=drawn))
    first = len(clothes.classes)
    for part, kinds, count in (
        ("train", (clothes.train, characters.train), TRAIN_IMAGES // 2),
        ("t10k", (clothes.test, characters.test), TEST_IMAGES // 2),
    ):
        chosen = [kind.__getitems__(random.permutation(len(kind))[:count].tolist()) for kind in kinds]
        images = np.concatenate([images[:, 0].numpy() for images, _ in chosen])
        labels = np.concatenate([first * k + labels.numpy() for k, (_, labels) in enumerate(chosen)])
        _write_part(folder, part, images, labels)


def _write_part(folder: Path, part: str, images: NDArray[np.uint8], labels: NDArray[Any]) -> None:
    content = {
        f"{part}-images-idx3-ubyte": _header(0x08, images.shape) + images.tobytes(),
        f"{part}-labels-idx1-ubyte": _header(0x0B, labels.shape) + labels.astype(">i2").tobytes(),
    }
    for name, values in content.items():
        with replaced(folder / name) as partial:
            partial.write_bytes(values)


def _header(kind: int, shape: tuple[int, ...]) -> bytes:
    """Two zeros, the type of the values, the number of dimensions, and their sizes."""
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def main() -> None:
    """Draw the characters and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=1000, help="number of characters")
    parser.add_argument("--fonts", default="/usr/share", type=Path, help="folder of the fonts")
    parser.add_argument("--output", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    folder = arguments.output or ROOT / "outputs" / f"characters-{arguments.classes}"
    try:
        write(folder, arguments.classes, fonts_in(arguments.fonts))
    except ValueError as error:
        parser.error(str(error))
    print(f"Wrote {folder}")


if __name__ == "__main__":
    main()
