"""Responses to failed requests: problems as defined in RFC 9457."""

from __future__ import annotations

import http
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from ..errors import StreamDiffVSRError

CONTENT_TYPE = "application/problem+json"


class Problem(BaseModel):
    """A problem as defined in RFC 9457."""

    type: str = "about:blank"
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["model: there is no model 'v9' here; GET /api/v1/models lists the models."])


class ProblemError(StreamDiffVSRError):
    """Raised to refuse a request; the message states the reason."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        self.status, self.headers = status, {name.replace("_", "-"): text for name, text in headers.items()}
        super().__init__(detail)


def problem_response(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the response that reports a problem."""
    readable = detail.encode("utf-8", "replace").decode()
    problem = Problem(title=http.HTTPStatus(status).phrase, status=status, detail=readable)
    return JSONResponse(problem.model_dump(), status, headers=headers, media_type=CONTENT_TYPE)


def sentence_of(errors: Sequence[Mapping[str, Any]], skip: int = 0) -> str:
    """Summarise pydantic's validation errors in one sentence."""
    places = [".".join(map(str, each["loc"][skip:])) or "request" for each in errors]
    return "; ".join(f"{place}: {each['msg']}" for place, each in zip(places, errors, strict=True))[:1000]


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "Why the request was refused.", "model": Problem},
    "5XX": {"description": "What went wrong.", "model": Problem},
}
"""The error responses in the description of every route."""


def install_handlers(app: FastAPI) -> None:
    """Make the application report every failed request as an RFC 9457 problem."""

    @app.exception_handler(ProblemError)
    def refused(request: Request, error: ProblemError) -> JSONResponse:
        return problem_response(error.status, str(error), error.headers)

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return problem_response(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(422, sentence_of(error.errors(), skip=1))

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> JSONResponse:
        return problem_response(500, f"The server failed ({type(error).__name__}); see its log.")
