"""Export a trained model to timm's format, ONNX or torch.export, and verify the result."""
