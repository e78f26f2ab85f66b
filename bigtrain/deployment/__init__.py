"""Programs of a trained model that run without bigtrain: torch.export's and ONNX."""
