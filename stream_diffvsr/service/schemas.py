"""Data models for requests and responses, used for validation and in the API's description."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

STATES = Literal["uploaded", "queued", "running", "finished", "failed", "cancelled"]


class Upscaling(BaseModel):
    """A request to upscale a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field("nano", max_length=200, description="Name of a model, as listed by /api/v1/models.")
    preset: str = Field("exact", max_length=50, description="A preset of the model's family.")
    size: str = Field(
        "4x", max_length=20, description="A factor (2x, 3x, 4x) or the short edge (720p to 2160p)."
    )
    format: str | None = Field(
        None,
        max_length=10,
        description="File extension of the result, such as .mp4; null means the source's, if possible.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the job, the loader and the model's family, by name.",
    )
    source: str | None = Field(
        None,
        max_length=2000,
        description="Source to use instead of an upload: s3://bucket/key, or a path inside a folder that the "
        "server allows. In that case, the caller chooses the task id (a UUID), so sending the same request "
        "again is harmless.",
    )
    target: str | None = Field(
        None, max_length=1200, description="s3://bucket/key to which the result is also uploaded."
    )
    download: bool = Field(False, description="Whether to download the model if it is not on the server.")


class Status(BaseModel):
    """The status of a task."""

    task_id: str = Field(examples=["0f8e4a4cb3d94f6a9d1c5be9d2d0a7b1"])
    kind: Literal["videos", "images"]
    name: str = Field(description="Original name of the file.", examples=["holiday.mp4"])
    status: STATES = Field(description="'uploaded' means that no job has been started yet.")
    frames_done: int = Field(examples=[120])
    frames_total: int | None = Field(examples=[2400])
    fps: float | None = Field(examples=[2.5])
    seconds_left: float | None = Field(examples=[912.0])
    message: str = Field(
        description="The reason for a failure, or the current step before or after upscaling.", examples=[""]
    )
    position: int | None = Field(description="Jobs ahead of this one in the queue.", examples=[None])
    device: str | None = Field(examples=["cuda:0"])
    created: float = Field(description="Seconds since 1970.", examples=[1764170000.0])
    ended: float | None = Field(examples=[None])
    size: list[int] | None = Field(description="Width and height of the source.", examples=[[640, 360]])
    output_size: list[int] | None = Field(examples=[[2560, 1440]])
    codec: str | None = Field(examples=["h264"])
    request: dict[str, Any] = Field(description="The job as requested.", examples=[{"model": "nano"}])
    has_result: bool = Field(
        description="Whether there is a result to download: the whole result if the job has finished, or the "
        "finished part if it was cancelled."
    )
    preview: str | None = Field(
        description="Changes whenever a newer preview.jpg is available; null if there is none.",
        examples=["18a5b3c2d1e0f000"],
    )


class Tasks(BaseModel):
    """A page of the list of tasks, newest first."""

    tasks: list[Status]


class Model(BaseModel):
    """A model that requests can name."""

    name: str = Field(examples=["v1"])
    family: str = Field(examples=["diffvsr"])
    title: str = Field(examples=["Stream-DiffVSR"])
    here: bool = Field(description="Whether the model is on the server.")
    download_gigabytes: float | None = Field(None, examples=[4.0])
    can_download: bool | None = None


class Models(BaseModel):
    """All available models."""

    models: list[Model]


class Device(BaseModel):
    """A device and its memory in bytes."""

    name: str = Field(examples=["cuda:0"])
    title: str = Field(examples=["NVIDIA H100"])
    total: int
    used: int
    free: int
    works: bool = Field(description="Whether this server runs jobs on the device.")


class Capabilities(BaseModel):
    """The devices, limits, formats and options of this server."""

    version: str
    devices: list[Device]
    limits: dict[str, float] = Field(
        examples=[{"max_bytes": 2e10, "max_pixels": 35389440, "max_seconds": 21600}]
    )
    s3: bool = Field(description="Whether s3:// addresses are supported.")
    paths: bool = Field(description="Whether paths on the server may be used as sources.")
    source_suffixes: dict[str, list[str]] = Field(
        description="File extensions of images; files with any other extension are treated as videos."
    )
    formats: dict[str, list[str]] = Field(description="Supported file extensions for results.")
    job: dict[str, Any] = Field(description="JSON schema of a job's options, and how to display them.")
    loader: dict[str, Any] = Field(description="JSON schema of the options for loading a model.")
    families: dict[str, Any] = Field(description="JSON schema of each family's options, with its presets.")


class Login(BaseModel):
    """A login request from the web page."""

    model_config = ConfigDict(extra="forbid", strict=True)
    token: str = Field(max_length=1000)
