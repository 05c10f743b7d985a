"""GGUF files for llama.cpp: ``export_gguf`` from memory, ``export_gguf_folder`` streamed from a model folder."""

from moesaic.convert.gguf.export import export_gguf, export_gguf_folder, export_tensors
from moesaic.convert.gguf.number_types import KINDS, Kind
from moesaic.convert.gguf.report import GgufReport, Share

__all__ = ["KINDS", "GgufReport", "Kind", "Share", "export_gguf", "export_gguf_folder", "export_tensors"]
