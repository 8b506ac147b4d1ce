"""Canonical ONNX → MIL, the language of Core ML's ML Programs, operator by operator."""
