"""Build time: checkpoint to bundle. May import torch and onnx; the runtime never imports this."""
