"""The same random numbers in every run."""

import pytest
import torch

torch.manual_seed(0)  # before the modules here make their example tensors


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
