"""Settings of the whole test run, and fixtures that several test files share."""

import logging
import os

import pytest
import torch

from quantpass.lowering.standin_cann import StandinError, ensure_standins
from quantpass.lowering.standin_process import TorchairProcess
from tests.fuzz.running import Fuzz

pytest_plugins = ["tests.skips"]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors and several test processes: threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def a_file_leaves_nothing_behind():
    """Dynamo makes a size dynamic where it saw another one of a class that two files use; examples silence warnings."""
    torch.compiler.reset()
    logger = logging.getLogger("quantpass")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def quiet():
    """PyTorch's structured trace, which pytest would collect for every graph."""
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)


@pytest.fixture(autouse=True, scope="session")
def exceptions_are_seen():
    """What the boundary of a site would turn into a verdict fails the test instead."""
    os.environ["QUANTPASS_RAISE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def every_rewritten_graph_is_verified():
    os.environ["QUANTPASS_VERIFY_GRAPH"] = "1"


@pytest.fixture(autouse=True, scope="session")
def reports_are_not_broken_into_lines():
    """Test runners say how wide their terminal is, and a report would fit itself to that."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True, scope="session")
def offline():
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def torchair():
    """A process that runs torchair; skips where torch_npu's wheel or a C compiler is missing."""
    try:
        ensure_standins()
    except StandinError as error:
        pytest.skip(str(error))
    with TorchairProcess() as process:
        yield process


@pytest.fixture
def fuzz(capsys):
    """Draws cases and counts what became of them; the counts are shown."""

    def say(text):
        with capsys.disabled():
            print(f"\n{text}")

    return Fuzz(say)
