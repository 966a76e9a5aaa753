"""Build time: datasets, activation ranges, quantization. May import torch and onnx."""
