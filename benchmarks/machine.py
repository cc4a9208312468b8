"""What a benchmark runs on, and the memory that it takes there."""

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


def memory(field: str) -> int:
    """Bytes of ``VmRSS``, what this process holds, or ``VmHWM``, the most that it held; Linux says so."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
