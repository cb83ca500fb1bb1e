"""Run graphs with ONNX Runtime, on a CPU or, through CUDA or TensorRT, on an NVIDIA GPU."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import IncompatibleInputError
from ..weights.folders import user_cache
from .graph import Call, Graph, Shapes
from .kept import built_once

PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""ONNX Runtime's providers for each name, best first; each runs the operations that the earlier providers
cannot run. Only cpu has been tested so far."""

MODEL = "model.onnx"


class ONNX:
    """A `Runtime` that computes in the networks' number format; half precision is built into the graph."""

    name = "onnx"

    def __init__(
        self, provider: str = "auto", device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Check the settings and the installation.

        Raises `IncompatibleInputError` for unsupported settings and `ModuleNotFoundError` without ONNX
        Runtime.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise ModuleNotFoundError(
                "runtime onnx needs ONNX Runtime, available for Python 3.11 and newer: pip install "
                "onnxruntime onnx onnxscript (onnxruntime-gpu for cuda and tensorrt), or choose runtime torch"
            ) from error
        self.device, self.dtype = device or torch.device("cpu"), dtype
        self.number_format = str(dtype).removeprefix("torch.")
        usual = "cuda" if self.device.type == "cuda" else "cpu"
        self.provider = usual if provider == "auto" else provider
        there = onnxruntime.get_available_providers()
        usable = [name for name, needed in PROVIDERS.items() if needed[0] in there]
        if self.provider not in usable:
            raise IncompatibleInputError(
                f"provider must be one that this ONNX Runtime supports ({', '.join(['auto', *usable])}), not "
                f"{provider!r}"
            )
        if (self.provider == "cpu") != (self.device.type == "cpu"):
            wanted = "cpu" if self.provider == "cpu" else "cuda"
            raise IncompatibleInputError(f"provider {self.provider} needs device {wanted}, not {self.device}")
        if dtype == torch.bfloat16:
            raise IncompatibleInputError("runtime onnx needs dtype float32 or float16, not bfloat16")
        self.version, self.needs_profile = onnxruntime.__version__, self.provider == "tensorrt"

    @property
    def details(self) -> str:
        return f"{self.version}, {self.provider}"

    def open(self, graph: Graph) -> Call:
        import onnxruntime

        root = user_cache() / "onnx"

        def make(folder: Path) -> None:
            _convert(graph, folder / MODEL)

        with built_once(root, {**graph.key(), "onnx": self.version}, graph.size, make) as folder:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = torch.get_num_threads()
            # Threads that spin while waiting slow down everything else.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = onnxruntime.InferenceSession(
                folder / MODEL, options, providers=self._providers(graph, folder)
            )
        return _Session(session, self.device)

    def _providers(self, graph: Graph, folder: Path) -> list[Any]:
        index = self.device.index or 0
        settings: dict[str, dict[str, Any]] = {
            "CPUExecutionProvider": {},
            "CUDAExecutionProvider": {"device_id": index, "use_tf32": 0},
        }
        if graph.profile is not None:
            sizes = hashlib.sha256(repr(graph.profile).encode()).hexdigest()[:8]
            engines = user_cache() / "tensorrt" / f"{folder.name}-{sizes}-{_card(index)}"
            engines.mkdir(parents=True, exist_ok=True)
            settings["TensorrtExecutionProvider"] = {
                "device_id": index,
                "trt_engine_cache_enable": True,
                "trt_engine_cache_path": str(engines),
                "trt_timing_cache_enable": True,
                "trt_timing_cache_path": str(engines),
                **profile_settings(folder / MODEL, graph.profile),
            }
        return [(name, settings[name]) for name in PROVIDERS[self.provider]]


def profile_settings(path: Path, profile: tuple[Shapes, Shapes]) -> dict[str, str]:
    """Return TensorRT's settings for one engine that runs a converted graph at all sizes of its profile.

    The engine is optimised for the largest size.
    """
    import onnx

    names = [each.name for each in onnx.load(path, load_external_data=False).graph.input]

    def text(shapes: Shapes) -> str:
        sized = ((name, shape) for name, shape in zip(names, shapes, strict=True) if shape)
        return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in sized)

    smallest, largest = (text(shapes) for shapes in profile)
    keys = "trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"
    return dict(zip(keys, (smallest, largest, largest), strict=True))


class _Session:
    """An ONNX Runtime session as a `Call`; tensors stay on their device, even if it is a GPU."""

    def __init__(self, session: Any, device: torch.device) -> None:
        self.session, self.device = session, device
        self.names = [each.name for each in session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        from onnxruntime import OrtValue

        from ..devices import synchronize

        binding = self.session.io_binding()
        for name, x in zip(self.names, inputs, strict=True):
            x = x.detach().to(self.device).contiguous()
            binding.bind_ortvalue_input(name, OrtValue.from_dlpack(x))
        for each in self.session.get_outputs():
            binding.bind_output(each.name, self.device.type, self.device.index or 0)
        synchronize(self.device)  # wait until torch has computed the inputs
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return [torch.from_dlpack(value) for value in binding.get_outputs()]


def _convert(graph: Graph, path: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "runtime onnx needs onnx and onnxscript to convert networks: pip install onnx onnxscript"
        ) from error
    program = graph.export()
    with torch.no_grad():
        made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    made.save(path, external_data=True)


def _card(index: int) -> str:
    """Return what an engine depends on: the GPU's name and capability, and CUDA's and TensorRT's versions."""
    import tensorrt  # type: ignore[import-not-found]

    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index).replace(" ", "-")
    return f"{name}-{major}.{minor}-{torch.version.cuda}-{tensorrt.__version__}"
