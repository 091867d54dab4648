"""The engine: runs one exported ONNX file, without torch or a web framework."""
