"""Settings of the whole test run."""

import logging
import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors and several test processes: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def quiet():
    """PyTorch's structured trace, which pytest would collect for every graph."""
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)


@pytest.fixture(autouse=True, scope="session")
def offline():
    os.environ["HF_HUB_OFFLINE"] = "1"
