"""What goes over the wire, for the checks and for the description of the API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

STATES = Literal["uploaded", "queued", "running", "finished", "failed", "cancelled"]


class Upscaling(BaseModel):
    """What shall become of a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field("nano", max_length=200, description="A model that /api/v1/models lists.")
    preset: str = Field("exact", max_length=50, description="A preset of the model's family.")
    size: str = Field(
        "4x", max_length=20, description="A factor (2x, 3x, 4x) or the short edge (720p to 2160p)."
    )
    format: str | None = Field(
        None,
        max_length=10,
        description="Suffix of the result, such as .mp4; null: that of the source where possible.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of the job, of the loader and of the model's family, by name.",
    )
    source: str | None = Field(
        None,
        max_length=2000,
        description="Instead of an upload: s3://bucket/key, or a path below a folder that the server "
        "allows. The task id is then a UUID that the caller makes up; the same request again does no harm.",
    )
    target: str | None = Field(
        None, max_length=1200, description="s3://bucket/key to which the result goes, too."
    )
    download: bool = Field(False, description="Whether a model that is not here may be downloaded.")


class Status(BaseModel):
    """How a task stands."""

    task_id: str = Field(examples=["0f8e4a4cb3d94f6a9d1c5be9d2d0a7b1"])
    kind: Literal["videos", "images"]
    name: str = Field(description="The file's name, as its sender calls it.", examples=["holiday.mp4"])
    status: STATES = Field(description="'uploaded': no job was asked for yet.")
    frames_done: int = Field(examples=[120])
    frames_total: int | None = Field(examples=[2400])
    fps: float | None = Field(examples=[2.5])
    seconds_left: float | None = Field(examples=[912.0])
    message: str = Field(
        description="Why it failed, or what it is doing besides making frames.", examples=[""]
    )
    position: int | None = Field(description="How many jobs are ahead of it in the queue.", examples=[None])
    device: str | None = Field(examples=["cuda:0"])
    created: float = Field(description="Seconds since 1970.", examples=[1764170000.0])
    ended: float | None = Field(examples=[None])
    size: list[int] | None = Field(description="Width and height of the source.", examples=[[640, 360]])
    output_size: list[int] | None = Field(examples=[[2560, 1440]])
    codec: str | None = Field(examples=["h264"])
    request: dict[str, Any] = Field(description="The job as it was asked for.", examples=[{"model": "nano"}])
    has_result: bool = Field(
        description="Whether there is a file to fetch: whole if finished, what was done if cancelled."
    )
    preview: str | None = Field(
        description="Changes when there is a newer preview.jpg; null: none.", examples=["18a5b3c2d1e0f000"]
    )


class Tasks(BaseModel):
    """A page of the list, the newest first."""

    tasks: list[Status]


class Model(BaseModel):
    """A model that can be named."""

    name: str = Field(examples=["v1"])
    family: str = Field(examples=["diffvsr"])
    title: str = Field(examples=["Stream-DiffVSR"])
    here: bool = Field(description="Whether it is on this machine.")
    download_gigabytes: float | None = Field(None, examples=[4.0])
    can_download: bool | None = None


class Models(BaseModel):
    """All models."""

    models: list[Model]


class Device(BaseModel):
    """A device with its memory in bytes."""

    name: str = Field(examples=["cuda:0"])
    title: str = Field(examples=["NVIDIA H100"])
    total: int
    used: int
    free: int
    works: bool = Field(description="Whether this server runs jobs on it.")


class Capabilities(BaseModel):
    """What this server can do."""

    version: str
    devices: list[Device]
    limits: dict[str, float] = Field(
        examples=[{"max_bytes": 2e10, "max_pixels": 35389440, "max_seconds": 21600}]
    )
    s3: bool = Field(description="Whether s3:// is understood.")
    paths: bool = Field(description="Whether paths on the server may be sources.")
    source_suffixes: dict[str, list[str]] = Field(description="Of images; anything else counts as video.")
    formats: dict[str, list[str]] = Field(description="Suffixes of results.")
    job: dict[str, Any] = Field(description="JSON schema of the options of a job, and how they are shown.")
    loader: dict[str, Any] = Field(description="The same of the options that open the model.")
    families: dict[str, Any] = Field(description="The same of each family, with its presets.")


class Login(BaseModel):
    """What the page sends once."""

    model_config = ConfigDict(extra="forbid", strict=True)
    token: str = Field(max_length=1000)
