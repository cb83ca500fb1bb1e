"""The routes: the REST API under /api/v1, and the page."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from pydantic import BaseModel, ValidationError

from .. import __version__
from . import problems, uploads
from .command import Checks
from .guard import COOKIE, Guard, cookie_of, equal_in_constant_time
from .jobs import Jobs
from .problems import ProblemError
from .schemas import Capabilities, Login, Models, Status, Tasks, Upscaling
from .served import serve
from .settings import Settings
from .store import KINDS, Store, Task
from .worker import Workers

MONTH = 30 * 86400
BODY_BYTES = 64 * 1024
"""The maximum size of a JSON request."""
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"": "index.html", "page.css": "page.css", "page.js": "page.js", "icon.svg": "icon.svg"}
PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

Body = TypeVar("Body", bound=BaseModel)


def json_body(model: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """Return a dependency that strictly parses a JSON request of at most BODY_BYTES as `model`."""

    async def read(request: Request) -> Body:
        content = b""
        async for chunk in request.stream():
            content += chunk
            if len(content) > BODY_BYTES:
                raise ProblemError(413, f"A JSON request must not exceed {BODY_BYTES // 1024} kB.")
        try:
            return model.model_validate(json.loads(content or b"{}", parse_constant=_no_number))
        except ValidationError as error:
            raise ProblemError(422, problems.sentence_of(error.errors())) from error
        except (ValueError, RecursionError) as error:
            raise ProblemError(400, "The request is not valid JSON.") from error

    return read


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not valid JSON")


def described(model: type[BaseModel], **examples: Any) -> dict[str, Any]:
    """Return the OpenAPI description of a body that `json_body` reads."""
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {uploads.FILE: {"type": "string", "format": "binary"}},
                    "required": [uploads.FILE],
                }
            }
        },
    }
}
FILE_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "content": {"application/octet-stream": {}}},
    206: {"description": "The part requested with the Range header."},
    304: {"description": "Unchanged: If-None-Match matches the current ETag."},
}


def create(settings: Settings) -> FastAPI:
    """Create the application, which also runs the jobs."""
    settings.root.mkdir(parents=True, exist_ok=True)
    store, checks = Store(settings.root.resolve()), Checks()
    workers = Workers(store, settings, checks)
    jobs = Jobs(store, settings, checks, workers)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        store.remove_leftovers()
        await workers.start()
        besides = [asyncio.create_task(checks.end_when_idle()), asyncio.create_task(jobs.clean())]
        yield
        await workers.stop()
        for each in besides:
            each.cancel()
        await checks.close()

    app = FastAPI(
        title="Stream-DiffVSR",
        version=__version__,
        summary="Upscale videos and images.",
        lifespan=lifespan,
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, settings=settings)
    problems.install_handlers(app)
    for kind in KINDS:
        app.include_router(tasks_router(kind, jobs))
        app.include_router(files_router(kind, jobs))
    app.include_router(house_router(settings, jobs))
    app.include_router(page_router())
    describe(app)
    return app


def tasks_router(kind: str, jobs: Jobs) -> APIRouter:
    """Create the routes for tasks of one kind, videos or images."""
    router = APIRouter(prefix=f"/api/v1/{kind}", tags=[kind], responses=problems.RESPONSES)
    store = jobs.store

    def task(task_id: str) -> Task:
        return jobs.task(kind, task_id)

    @router.get("", summary="List tasks, newest first", operation_id=f"{kind}_list")
    async def newest(limit: int = Query(50, ge=1, le=500), offset: int = Query(0, ge=0, le=10**9)) -> Tasks:
        return Tasks(tasks=[jobs.status(each) for each in store.newest(kind, limit, offset)])

    @router.post(
        "/upload", status_code=201, summary="Upload a file", operation_id=f"{kind}_upload", openapi_extra=FORM
    )
    async def upload(request: Request) -> Status:
        length = request.headers.get("content-length", "0")
        jobs.check_room(int(length) if length.isdecimal() and len(length) < 20 else 0)
        return jobs.status(await receive(request, kind, jobs))

    @router.post(
        "/{task_id}/upscaling",
        status_code=202,
        summary="Start the job",
        operation_id=f"{kind}_upscaling",
        openapi_extra=described(
            Upscaling,
            upload={"model": "nano", "size": "2x", "options": {"seed": 1}},
            s3={"source": f"s3://{kind}/in.mp4", "target": f"s3://{kind}/out.mp4", "model": "v1"},
        ),
    )
    async def upscaling(task_id: str, asked: Upscaling = Depends(json_body(Upscaling))) -> Status:  # noqa: B008
        return jobs.status(await jobs.submit(kind, task_id, asked))

    @router.get("/{task_id}/status", summary="Get the status", operation_id=f"{kind}_status")
    async def status(task_id: str) -> Status:
        return jobs.status(task(task_id))

    @router.delete(
        "/{task_id}", summary="Cancel the job and keep or delete its files", operation_id=f"{kind}_delete"
    )
    async def delete(task_id: str, remove: bool = False) -> Status:
        """Cancel the job and keep its finished part, or, with `remove`, delete the task and its files."""
        found = await jobs.workers.cancel(task(task_id))
        if remove:
            await asyncio.to_thread(store.remove_files, found)
            store.remove(found)
        return jobs.status(found)

    return router


def files_router(kind: str, jobs: Jobs) -> APIRouter:
    """Create the routes for the files of a task."""
    router = APIRouter(prefix=f"/api/v1/{kind}/{{task_id}}", tags=[kind], responses=problems.RESPONSES)
    store = jobs.store

    def task(task_id: str) -> Task:
        return jobs.task(kind, task_id)

    @router.get(
        "/result",
        summary="Download the result, or ranges of it",
        operation_id=f"{kind}_result",
        responses=FILE_ANSWER,
        response_class=Response,
    )
    async def result(request: Request, task_id: str, download: bool = False) -> Response:
        found = task(task_id)
        if found.state not in ("finished", "cancelled"):
            raise ProblemError(409, f"There is no result yet: the task is {found.state}.")
        path = store.result_of(found)
        return serve(request, path, f"{Path(found.name).stem}_upscaled{path.suffix}", download=download)

    @router.get(
        "/source",
        summary="Download the uploaded file",
        operation_id=f"{kind}_source",
        responses=FILE_ANSWER,
        response_class=Response,
    )
    async def source(request: Request, task_id: str) -> Response:
        found = task(task_id)
        return serve(request, store.source_of(found), found.name)

    @router.get(
        "/preview.jpg",
        summary="Get the newest frame: left half bicubic, right half upscaled by the model",
        operation_id=f"{kind}_preview",
        responses={**FILE_ANSWER, 200: {"description": "The picture.", "content": {"image/jpeg": {}}}},
        response_class=Response,
    )
    async def preview(request: Request, task_id: str) -> Response:
        return serve(request, store.preview_of(task(task_id)))

    return router


async def receive(request: Request, kind: str, jobs: Jobs) -> Task:
    """Store an upload as a new task; if the upload fails, delete its files."""
    store, task_id = jobs.store, uuid.uuid4().hex
    folder = store.folder / task_id
    folder.mkdir()
    try:
        upload = uploads.Upload(folder / "upload", jobs.settings.max_bytes)
        await upload.receive(request)
        task = replace(await jobs.named(kind, upload.name or ""), id=task_id)
        upload.target.rename(store.source_of(task))
        return store.add(task)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def house_router(settings: Settings, jobs: Jobs) -> APIRouter:
    """Create the routes for information about the server and for the page's login."""
    router = APIRouter(prefix="/api/v1", tags=["server"], responses=problems.RESPONSES)

    @router.get("/models", summary="List models and required downloads", response_model_exclude_none=True)
    async def models() -> Models:
        return Models.model_validate(await jobs.checks.about(fresh=True))

    @router.get("/capabilities", summary="List devices (with their memory), options, limits and formats")
    async def capabilities() -> Capabilities:
        about = await jobs.checks.about(fresh=True)
        devices = jobs.workers.devices
        works = about["devices"][0]["name"] if "auto" in devices else ""
        return Capabilities(
            version=__version__,
            devices=[{**each, "works": each["name"] in (*devices, works)} for each in about["devices"]],  # type: ignore[misc]
            limits={name: getattr(settings, name) for name in ("max_bytes", "max_pixels", "max_seconds")},
            s3=importlib.util.find_spec("obstore") is not None,
            paths=bool(settings.allow),
            source_suffixes={"images": about["pictures"]},
            formats=about["written"],
            **{name: about[name] for name in ("job", "loader", "families")},
        )

    @router.post(
        "/session",
        summary="Exchange the token for the page's cookie",
        status_code=204,
        openapi_extra=described(Login),
    )
    async def session(request: Request, login: Login = Depends(json_body(Login))) -> Response:  # noqa: B008
        if settings.token and not equal_in_constant_time(login.token, settings.token):
            raise ProblemError(401, "The token is incorrect.")
        answer = Response(status_code=204)
        if settings.token:
            secure = request.url.scheme == "https"
            answer.set_cookie(
                COOKIE,
                cookie_of(settings.token),
                httponly=True,
                samesite="strict",
                secure=secure,
                max_age=30 * 86400,
            )
        return answer

    return router


def page_router() -> APIRouter:
    """Create the routes for the files of the page."""
    router = APIRouter(include_in_schema=False)

    def add(path: str, file: Path) -> None:
        @router.get(f"/{path}", name=file.name)
        async def get(request: Request) -> Response:
            return serve(request, file, kind=PAGE_TYPES[file.suffix])

    for path, name in PAGE_FILES.items():
        add(path, PAGE / name)
    return router


def describe(app: FastAPI) -> None:
    """Add the request models and the token, which the routes do not declare, to the API's description."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            models = schema["components"]["schemas"]
            for model in (Upscaling, Login):
                models[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"token": []}, {}]
        return app.openapi_schema or plain()

    app.openapi = openapi  # type: ignore[method-assign]
