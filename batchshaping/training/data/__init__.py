"""Images to train on and to test on, with their labels.

Data sets that fit in memory are tensors. A batch of them is taken, shifted and flipped at once, on the device
that trains. Folders of images are read by torchvision, image by image.
"""

from batchshaping.training.data.augmentation import shift_and_flip
from batchshaping.training.data.batching import batches
from batchshaping.training.data.dataset import Batch, Data, DataError, Images, ImagesInMemory
from batchshaping.training.data.load import load_data

__all__ = [
    "Batch",
    "Data",
    "DataError",
    "Images",
    "ImagesInMemory",
    "batches",
    "load_data",
    "shift_and_flip",
]
