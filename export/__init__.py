"""Export: from a run's members to one averaged-logit ONNX graph."""
