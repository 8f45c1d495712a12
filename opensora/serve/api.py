"""The routes: /v1/videos and /v1/models after OpenAI's API, /health, /metrics, and the page.

Handlers that touch the disk run in threads, so no request waits for another's. Source of the
fields and paths: platform.openai.com/docs/api-reference/videos; `step`, `steps`, `seed`,
`command` and the bounds of the model are additions.
"""

# Annotations are evaluated here, because FastAPI reads them and is imported in a function.
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from opensora import __version__
from opensora.errors import StorageError, require
from opensora.infer.pipeline import VideoPipeline
from opensora.media.write import safe_name
from opensora.serve import forms, jobs, metrics, uploads, views
from opensora.serve.clients import client_of
from opensora.serve.config import Bounds, ServeConfig
from opensora.serve.jobs import Job, Store
from opensora.serve.refusals import Refusal, quoted
from opensora.serve.request import VideoFields, check
from opensora.serve.shield import BROKEN, Shield
from opensora.serve.workers import Workers

PAGE = {
    "/": ("opensora.serve", "page.html", "text/html"),
    "/page.css": ("opensora.serve", "page.css", "text/css"),
    "/page.js": ("opensora.serve", "page.js", "text/javascript"),
    "/icon.svg": ("opensora.serve", "icon.svg", "image/svg+xml"),
    "/report.css": ("opensora.report", "page.css", "text/css"),
}
"""Path -> package, file and type; the page wears the report's style."""
GONE = "there is no such video; it may have been removed"
OPEN_PATHS = frozenset({*PAGE, "/health"})
"""Answered without a token: they tell nothing about models or videos."""


@dataclass
class Service:
    """A checkpoint that is served.

    Attributes:
        pipelines: one a device, of the same weights.
        checkpoint: as the operator wrote it, for commands that reproduce.
        name: the model's id.
    """

    config: ServeConfig
    pipelines: list[VideoPipeline]
    store: Store
    checkpoint: str
    name: str
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.bounds = Bounds.of(self.config, self.pipelines[0].shape)
        self.workers = Workers(
            self.store,
            self.pipelines,
            capacity=self.config.queue,
            per_client=self.config.queue_per_client,
            model=self.name,
            checkpoint=self.checkpoint,
        )

    def view(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        position = self.workers.position(job.id)
        return views.video(job, model=self.name, checkpoint=self.checkpoint, position=position)

    def card(self) -> dict[str, Any]:
        """The model as clients see it."""
        return views.model_card(
            self.pipelines[0], name=self.name, created=self.created, bounds=self.bounds,
            checkpoint=self.checkpoint,
        )  # fmt: skip

    def find(self, name: str) -> Job:
        """A job by its id.

        Raises:
            Refusal: there is none.
        """
        job = self.store.get(name)
        if job is None:
            raise Refusal("not_found", GONE)
        return job

    def create(
        self, tree: dict[str, Any], picture: bytes | None, *, client: str | None = None
    ) -> Job:
        """Check, decode, queue.

        Args:
            client: who asks, as `clients.client_of` has it.

        Raises:
            Refusal: the request is not carried out, and nothing of it is kept.
        """
        self.workers.refuse_if_full(client)
        asked = check(
            tree,
            pipeline=self.pipelines[0],
            bounds=self.bounds,
            model=self.name,
            with_picture=picture is not None,
        )
        with _storage_refusals():
            if picture is None:
                return self.workers.submit(asked, client=client)
            with uploads.decoded(picture, self.store.folder, self.config) as path:
                return self.workers.submit(asked, path, client=client)

    def page(self, limit: int, after: str | None, order: str) -> dict[str, Any]:
        """Jobs, the newest first by default, from the one that follows `after`."""
        found = self.store.jobs()
        if order == "desc":
            found.reverse()
        if after is not None:
            places = [place for place, job in enumerate(found) if job.id == after]
            if not places:
                raise Refusal("not_found", GONE, param="after")
            found = found[places[0] + 1 :]
        shown = [self.view(job) for job in found[:limit]]
        return {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(found) > limit,
        }


@contextmanager
def _storage_refusals() -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise Refusal("storage", "the server's disk is full or failing") from None


def build(service: Service, *, token: str | None = None) -> Shield:
    """The ASGI application of a service; its lifespan starts and stops the workers."""
    require("fastapi", extra="serve", purpose="the HTTP service")
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        service.workers.start()
        yield
        service.workers.stop(service.config.shutdown_seconds)

    app = FastAPI(
        title="opensora", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip

    async def refused(request: Any, error: Any) -> JSONResponse:
        return JSONResponse(error.body, error.status, headers=error.headers)

    async def unrouted(request: Any, error: Any) -> JSONResponse:
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        refusal = Refusal(code, str(error.detail))
        headers = {k: v for k, v in (error.headers or {}).items() if k.lower() == "allow"}
        return JSONResponse(refusal.body, refusal.status, headers=headers)

    async def broken(request: Any, error: Any) -> JSONResponse:
        return JSONResponse(Refusal("internal", BROKEN).body, 500)

    app.add_exception_handler(Exception, broken)
    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, unrouted)
    shield = Shield(app, service.config, token=token, open_paths=OPEN_PATHS)
    _add_videos(app, service)
    _add_reading(app, service)
    _add_operations(app, service, shield)
    _add_page(app)
    return shield


def _add_videos(app: Any, service: Service) -> None:
    """What changes jobs."""
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request

    schema = VideoFields.model_json_schema()
    form = {**schema, "properties": {**schema["properties"], uploads.PARAM: {
        "type": "string", "format": "binary", "description": "picture that the video begins with",
    }}}  # fmt: skip
    content = {
        "application/json": {"schema": schema},
        "multipart/form-data": {"schema": form},
    }
    body = {"requestBody": {"required": True, "content": content}}

    @app.post("/v1/videos", openapi_extra=body, summary="Queue a video")
    async def create(request: Request) -> dict[str, Any]:
        _only(request.query_params)
        fields, picture = await forms.read(request)
        client = client_of(
            request.client.host if request.client else None,
            request.headers.getlist("x-forwarded-for"),
            service.config.proxy,
        )
        job = await run_in_threadpool(service.create, fields, picture, client=client)
        return service.view(job)

    @app.delete("/v1/videos/{name}", summary="Cancel and remove a video")
    def remove(name: str, request: Request) -> dict[str, Any]:
        _only(request.query_params)
        service.find(name)
        with _storage_refusals():
            service.workers.remove(name)
        return {"id": name, "object": "video.deleted", "deleted": True}


def _add_reading(app: Any, service: Service) -> None:
    """What tells about jobs."""
    from fastapi.responses import FileResponse
    from starlette.requests import Request

    @app.get("/v1/videos", summary="List videos")
    def listing(request: Request) -> dict[str, Any]:
        query = _only(request.query_params, "limit", "after", "order")
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not re.fullmatch(r"[1-9][0-9]?|100", limit):
            raise Refusal("invalid_value", "`limit` is a number from 1 to 100", param="limit")
        if order not in ("asc", "desc"):
            raise Refusal("invalid_value", "`order` is asc or desc", param="order")
        return service.page(int(limit), query.get("after"), order)

    @app.get("/v1/videos/{name}", summary="Status and progress")
    def status(name: str, request: Request) -> dict[str, Any]:
        _only(request.query_params)
        return service.view(service.find(name))

    @app.get("/v1/videos/{name}/content", summary="The mp4", response_class=FileResponse)
    def content(name: str, request: Request) -> FileResponse:
        _only(request.query_params)
        job = service.find(name)
        if job.status != jobs.COMPLETED:
            raise Refusal("not_ready", f"the video is {job.status}; there is no content")
        path = service.store.path(name, jobs.VIDEO)
        return FileResponse(
            path,
            stat_result=_stat(path),
            media_type="video/mp4",
            filename=f"{safe_name(job.asked.prompt, job.order)}.mp4",
            content_disposition_type="inline",
        )

    @app.get("/v1/videos/{name}/input_reference", summary="The picture it begins with",
             response_class=FileResponse)  # fmt: skip
    def reference(name: str, request: Request) -> FileResponse:
        _only(request.query_params)
        if not service.find(name).has_reference:
            raise Refusal("not_found", "the video was drawn without a picture")
        path = service.store.path(name, jobs.REFERENCE)
        return FileResponse(
            path, stat_result=_stat(path), media_type="image/png", filename=jobs.REFERENCE
        )


def _stat(path: Path) -> os.stat_result:
    """What is sent, which may have been removed since its job was found.

    Raises:
        Refusal: it is not there.
    """
    try:
        return path.stat()
    except FileNotFoundError:
        raise Refusal("not_found", "the file is gone from the server's disk") from None


def _add_operations(app: Any, service: Service, shield: Shield) -> None:
    """Models, health and figures."""
    from fastapi.responses import JSONResponse, PlainTextResponse

    @app.get("/v1/models", summary="The model and its bounds")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name}", summary="The model and its bounds")
    def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise Refusal("not_found", f"this service has one model, '{service.name}'")
        return service.card()

    @app.get("/health", summary="Whether videos are drawn")
    def health() -> JSONResponse:
        well = service.workers.running
        return JSONResponse({"status": "ok" if well else "stopping"}, 200 if well else 503)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=PlainTextResponse)
    def figures() -> PlainTextResponse:
        text = metrics.text(service.store, service.workers, shield.answers)
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)


def _add_page(app: Any) -> None:
    from starlette.responses import Response

    def asset(path: str) -> Any:
        package, file, kind = PAGE[path]
        content = resources.files(package).joinpath(file).read_bytes()
        return lambda: Response(content, media_type=kind)

    for path in PAGE:
        app.get(path, include_in_schema=False)(asset(path))


def _only(query: Any, *names: str) -> dict[str, str]:
    """The query's values; what would be ignored is refused.

    Raises:
        Refusal: for another name, or one given twice.
    """
    pairs = query.multi_items()
    for name, _ in pairs:
        if name not in names or sum(name == other for other, _ in pairs) > 1:
            raise Refusal(
                "unknown_field", f"the query takes no `{quoted(name)}` here", param=quoted(name)
            )
    return dict(pairs)
