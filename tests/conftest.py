"""Every run of the tests draws the same examples and the same random numbers."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("batchshaping", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("batchshaping")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
