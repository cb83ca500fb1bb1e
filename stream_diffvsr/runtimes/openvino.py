"""Run graphs with OpenVINO, on a CPU or on an Intel GPU or NPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import IncompatibleInputError
from ..weights.folders import user_cache
from .graph import Call, Graph
from .kept import built_once

DEVICES = {"auto": "CPU", "cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
"""Our name for a provider -> OpenVINO's name for the device."""

HINTS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class OpenVINO:
    """A `Runtime` with float32 inputs and outputs; with any other `precision`, results are approximate."""

    name, needs_profile = "openvino", False
    dtype = torch.float32

    def __init__(self, provider: str = "auto", precision: torch.dtype = torch.float32) -> None:
        """Check the settings and the installation.

        Raises `IncompatibleInputError` for a missing device, or `ModuleNotFoundError` without OpenVINO.
        """
        try:
            import openvino
        except ImportError as error:
            raise ModuleNotFoundError(
                "runtime openvino needs OpenVINO: pip install openvino, or choose runtime torch"
            ) from error
        self.core, self.version = openvino.Core(), openvino.__version__
        if provider not in DEVICES:
            raise IncompatibleInputError(
                f"provider must be one of OpenVINO's ({', '.join(DEVICES)}), not {provider!r}"
            )
        self.device, self.precision = DEVICES[provider], precision
        self.number_format = str(precision).removeprefix("torch.")
        found = self.core.available_devices
        if not any(name.partition(".")[0] == self.device for name in found):
            raise IncompatibleInputError(
                f"OpenVINO found no {provider!r} device here, only {', '.join(found)}"
            )

    @property
    def details(self) -> str:
        threads = f", {torch.get_num_threads()} threads" if self.device == "CPU" else ""
        return f"{self.version.partition('-')[0]}, {self.device}, {HINTS[self.precision]}{threads}"

    def open(self, graph: Graph) -> Call:
        def make(folder: Path) -> None:
            import openvino

            model = openvino.convert_model(graph.export())
            openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)

        root = user_cache() / "openvino"
        with built_once(root, {**graph.key(), "openvino": self.version}, graph.size, make) as folder:
            model = self.core.read_model(folder / "model.xml")
            return _Request(self.core.compile_model(model, self.device, self._settings(root)))

    def _settings(self, root: Path) -> dict[str, Any]:
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self.device != "NPU":
            settings["INFERENCE_PRECISION_HINT"] = HINTS[self.precision]
        if self.device == "CPU":
            # On a busy machine, a thread pinned to a core would have to wait for other work on that core.
            threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False}
            return {**settings, **threads}
        return {**settings, "CACHE_DIR": str(root / "compiled")}  # saves minutes of compiling


class _Request:
    """A compiled model as a `Call`."""

    def __init__(self, model: Any) -> None:
        self.request = model.create_infer_request()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        arrays = {index: x.detach().cpu().contiguous().numpy() for index, x in enumerate(inputs)}
        outputs = self.request.infer(arrays, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(array.copy()).to(inputs[0].device) for array in outputs.values()]
