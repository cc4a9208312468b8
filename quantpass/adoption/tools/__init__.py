"""The tables, a file for each tool."""

from quantpass.adoption.tables import Tool
from quantpass.adoption.tools import awq, bitsandbytes, compressed_tensors, gptq, modelopt, quark

TOOLS: tuple[Tool, ...] = (compressed_tensors.TOOL, gptq.TOOL, awq.TOOL, bitsandbytes.TOOL, modelopt.TOOL, quark.TOOL)
"""In this order; the first whose table knows a module has it."""
