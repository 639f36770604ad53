"""ONNX Runtime: runs the numerics of a lowered graph on any host, and the graph itself on a GPU."""

from gate.engines.onnxruntime.backend import OnnxRuntimeBackend
from gate.engines.onnxruntime.runner import OnnxRuntimeRunner, reference_runner

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeRunner", "reference_runner"]
