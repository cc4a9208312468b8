"""Fixtures that several test files share."""

import pytest
from quantpass.lowering.standin_cann import StandinError, ensure_standins
from quantpass.lowering.standin_process import TorchairProcess


@pytest.fixture(scope="session")
def torchair():
    """A process that runs torchair; skips where torch_npu's wheel or a C compiler is missing."""
    try:
        ensure_standins()
    except StandinError as error:
        pytest.skip(str(error))
    with TorchairProcess() as process:
        yield process
