"""The handwritten digits of scikit-learn."""

from __future__ import annotations

import numpy as np
import torch

from batchshaping.training.data.dataset import Data, ImagesInMemory, data_in_memory
from batchshaping.training.sections import DataSettings

__all__ = ["digits"]


def digits(settings: DataSettings) -> Data:
    """The digits, three quarters of each class to train on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    loaded = load_digits()
    images = torch.from_numpy((loaded.images * 255 / 16).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(loaded.target).long()
    parts = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=loaded.target, random_state=0)
    train, test = (ImagesInMemory(images[part], labels[part]) for part in parts)
    return data_in_memory(train, test, [str(digit) for digit in range(10)], padding=1, flip=False)
