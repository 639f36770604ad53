"""TensorRT and TensorRT-RTX: build a plan from an ONNX file, and run it on a GPU."""
