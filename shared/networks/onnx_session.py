"""onnxruntime, which reports to its maker unless it is told not to. No torch."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime


def onnx_session(path: Path) -> "onnxruntime.InferenceSession":
    """The network of a file, to be run on the CPU; nothing leaves the machine."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when it is imported
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
