"""What a benchmark ran on, in one line."""

import platform
from pathlib import Path

import torch


def machine() -> str:
    """The processor, its vector instructions, threads and PyTorch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {capability}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
