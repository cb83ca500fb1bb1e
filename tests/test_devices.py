"""Devices and number formats: what does not exist here is refused with what does."""

from __future__ import annotations

import contextlib

import pytest
import torch
from samples import moving

from stream_diffvsr import IncompatibleInputError, UpscaleOptions, load_pipeline
from stream_diffvsr.devices import available, resolve_device, resolve_dtype


def test_auto_is_the_best_there_is():
    assert str(resolve_device("auto")) == available()[0]
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta", ""])
def test_unknown_devices_name_the_known(device):
    with pytest.raises(IncompatibleInputError, match="cpu") as caught:
        resolve_device(device)
    assert all(name in str(caught.value) for name in available())


@pytest.mark.parametrize("dtype", ["float8", torch.int8, torch.float64, None])
def test_unknown_dtypes_name_the_known(dtype):
    with pytest.raises(IncompatibleInputError, match="float32, float16, bfloat16"):
        resolve_dtype(dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_dtypes_by_name_and_by_value(dtype):
    assert resolve_dtype(dtype, torch.device("cpu")) == torch.float16


@pytest.mark.parametrize("wrong", [{"device": "cuda:99"}, {"dtype": "float8"}, {"flow": "horn"}])
def test_loading_refuses_them_too(checkpoint, wrong):
    with pytest.raises(IncompatibleInputError):
        load_pipeline(checkpoint, **{"device": "cpu", "flow": "none", **wrong})


@pytest.mark.cuda
def test_noise_is_that_of_the_cpu(checkpoint):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    lq = torch.zeros(1, 3, 16, 16)
    pipes = [load_pipeline(checkpoint, device=name, dtype="float32", flow="none") for name in ("cpu", "cuda")]
    cpu, cuda = (pipe.process_frame(lq).hq.cpu() for pipe in pipes)
    torch.testing.assert_close(cpu, cuda, atol=1e-2, rtol=0)


@pytest.mark.parametrize("breaks", [False, True])
def test_while_a_frame_is_computed_cudnn_repeats_itself(pipe, monkeypatch, breaks):
    """As ComfyUI may ask it not to (--fast autotune); afterwards it is as it was."""
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", False)

    def look(*step):
        seen.append((cudnn.deterministic, cudnn.benchmark))
        if breaks:
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        pipe.process_frame(moving(1), options=UpscaleOptions(num_inference_steps=1), on_step=look)
    assert set(seen) == {(True, False)}
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
