"""GGUF files for llama.cpp: ``export_gguf`` from memory, ``export_gguf_folder`` streamed from a model folder."""

from moesaic.convert.gguf.export import GgufReport, Share, export_gguf, export_gguf_folder
from moesaic.convert.gguf.number_types import KINDS, Kind

__all__ = ["KINDS", "GgufReport", "Kind", "Share", "export_gguf", "export_gguf_folder"]
