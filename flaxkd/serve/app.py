"""The application: flaxkd's own API and the page. Jobs, models, health, metrics; who may come in, and how much.

    GET  /                        the page                  GET  /api/jobs/ID              a job
    GET  /api/models              models, samplers, limits  GET  /api/jobs/ID/events       its progress, as it happens
    POST /api/jobs                a job                     POST /api/jobs/ID/cancel
    GET  /healthz /readyz /metrics                          GET  /api/jobs/ID/pictures/I   a PNG

openai_api.py and a1111_api.py have the routes of the others. Answers in error are OpenAI's everywhere but there.
"""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator, Mapping
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flaxkd.diffusion import samplers
from flaxkd.serve import a1111_api, openai_api
from flaxkd.serve.device import Device
from flaxkd.serve.jobs import Job, Queue
from flaxkd.serve.metrics import Metrics
from flaxkd.serve.requests import Limits, Refused, Served, checked

OPEN = re.compile(r"/|/healthz|/readyz|/api/jobs/[\w-]+/pictures/\d+")  # without a token; ids cannot be guessed
LOCAL = ("127.0.0.1", "localhost", "testserver")
BODY_SECONDS, EVERY = 30.0, 0.1  # for a body to arrive; between two looks at a job


@dataclasses.dataclass
class Server:
    """What the routes share. default: the model of a request that names none, which A1111's clients may change."""

    models: Mapping[str, Served]
    limits: Limits
    queue: Queue
    metrics: Metrics
    device: Device
    default: str

    async def body(self, http: HttpRequest) -> dict[str, Any]:
        """The JSON object of a request. Raises Refused."""
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("the body must be JSON, with content-type: application/json", 415)
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in http.stream():
                    data += chunk
                    if len(data) > self.limits.body:
                        raise Refused(f"the body has more than {self.limits.body} bytes", 413)
        except TimeoutError:
            raise Refused(f"the body did not arrive within {BODY_SECONDS:g} seconds", 408) from None
        try:
            found = json.loads(data)
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # halves of surrogate pairs, NaN, 1e999
        except (ValueError, RecursionError) as error:
            raise Refused(f"the body is no JSON: {error}"[:200], 400) from None
        if not isinstance(found, dict):
            raise Refused("the body must be a JSON object", 400)
        return found

    async def submit(self, fields: Mapping[str, Any], origin: str) -> Job:
        fields = {"model": self.default} | {name: value for name, value in fields.items() if value is not None}
        request = await run_in_threadpool(checked, fields, self.models, self.limits)
        return self.queue.submit(request, origin)

    async def finished(self, job: Job, http: HttpRequest) -> Job:
        """Waits for the pictures. The job of a client who has gone is cancelled. Raises Refused if it failed."""
        done = asyncio.wrap_future(job.done)
        while not job.done.done():
            await asyncio.wait([done], timeout=1.0)
            if not job.done.done() and await http.is_disconnected():
                self.queue.cancel(job)
        if job.error or job.cancelled:
            raise Refused(job.error or "the job was cancelled", 503 if self.queue.closed or job.cancelled else 500)
        return job


def described(server: Server, job: Job) -> dict[str, Any]:
    """A job as JSON. seconds: of the batches that drew its pictures."""
    request = job.request
    return {
        "id": job.id,
        "state": job.state,
        "model": request.model,
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
        "seconds": round(job.seconds, 4),
        "batch": job.batch,
        "ahead": server.queue.ahead(job) if job.state == "queued" else 0,
        "steps_done": min(job.steps_done, job.steps),
        "steps": job.steps,
        "settings": [request.info(i) for i in range(request.count)],
        "pictures": [f"/api/jobs/{job.id}/pictures/{i}" for i, data in enumerate(job.pictures) if data],
        "error": job.error,
    }


# -- Routes ------------------------------------------------------------------------------------------------------------


def _job(http: HttpRequest) -> Job:
    job = http.app.state.server.queue.jobs.get(http.path_params["id"])
    if job is None:
        raise Refused("there is no such job, or it is too old", 404)
    return job


async def page(http: HttpRequest) -> Response:
    return Response(http.app.state.page, media_type="text/html")


async def models(http: HttpRequest) -> Response:
    server = http.app.state.server
    found = [
        {
            "name": served.name,
            "parameters": served.parameters,
            "sizes": served.sizes,
            "sampler": served.sampler,
            "steps": min(samplers.usual_steps(None, served.pipeline.scheduler_config), server.limits.steps),
            "guidance": served.pipeline.folder.guidance,
        }
        for served in server.models.values()
    ]
    limits = server.limits._asdict() | {"waiting": server.queue.most}
    warm = {"done": len(server.device.warm), "of": len(server.device.programs)}
    return JSONResponse({"models": found, "samplers": samplers.KINDS, "limits": limits, "warm": warm})


async def create(http: HttpRequest) -> Response:
    server = http.app.state.server
    job = await server.submit(await server.body(http), "flaxkd")
    return JSONResponse(described(server, job), 202)


async def job(http: HttpRequest) -> Response:
    return JSONResponse(described(http.app.state.server, _job(http)))


async def cancel(http: HttpRequest) -> Response:
    http.app.state.server.queue.cancel(_job(http))
    return JSONResponse(described(http.app.state.server, _job(http)))


async def events(http: HttpRequest) -> Response:
    server, found = http.app.state.server, _job(http)

    async def stream() -> AsyncIterator[str]:
        before, done = None, asyncio.wrap_future(found.done)
        while True:
            over, now = found.done.done(), described(server, found)
            if now != before or over:
                yield f"event: {'end' if over else 'progress'}\ndata: {json.dumps(now)}\n\n"
            if over:
                return
            before = now
            await asyncio.wait([done], timeout=EVERY)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)


async def picture(http: HttpRequest) -> Response:
    index, pictures = http.path_params["index"], _job(http).pictures
    if index >= len(pictures) or pictures[index] is None:
        raise Refused("there is no such picture, or not yet", 404)
    return Response(pictures[index], media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


async def healthy(http: HttpRequest) -> Response:
    alive = http.app.state.server.device.is_alive()
    return JSONResponse({"status": "ok" if alive else "the device's thread has ended"}, 200 if alive else 503)


async def ready(http: HttpRequest) -> Response:
    device = http.app.state.server.device
    done = device.ready and not device.queue.closed
    return JSONResponse({"ready": done, "warm": len(device.warm), "of": len(device.programs)}, 200 if done else 503)


async def metrics(http: HttpRequest) -> Response:
    return Response(http.app.state.server.metrics.text(), media_type="text/plain; version=0.0.4")


ROUTES = [
    Route("/", page),
    Route("/api/models", models),
    Route("/api/jobs", create, methods=["POST"]),
    Route("/api/jobs/{id}", job),
    Route("/api/jobs/{id}/events", events),
    Route("/api/jobs/{id}/cancel", cancel, methods=["POST"]),
    Route("/api/jobs/{id}/pictures/{index:int}", picture),
    Route("/healthz", healthy),
    Route("/readyz", ready),
    Route("/metrics", metrics),
]


# -- Who may come in ---------------------------------------------------------------------------------------------------


def _allowed(authorization: str, token: str) -> bool:
    """Whether it is `Bearer TOKEN`, or HTTP's Basic with the token as the password, which A1111's clients send."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            value = base64.b64decode(value).decode().partition(":")[2]
    return scheme.lower() in ("basic", "bearer") and hmac.compare_digest(value.encode(), token.encode())


class Door:
    """Checks the token, counts the answers, and sets what a browser must know. token: None lets everybody in."""

    def __init__(self, app, server: Server, token: str | None, policy: str):
        self.app, self.server, self.token = app, server, token
        self.headers = [(b"content-security-policy", policy.encode()), (b"x-content-type-options", b"nosniff")]

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        authorization = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        shut = self.token and not OPEN.fullmatch(scope["path"]) and not _allowed(authorization, self.token)

        async def counted(message):
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self.server.metrics.answers.labels(path, message["status"]).inc()
                message["headers"] = [*message["headers"], *self.headers]
            await send(message)

        if shut:
            answer = refused(scope["path"], Refused("a token is needed: Authorization: Bearer TOKEN", 401))
            return await answer(scope, receive, counted)
        await self.app(scope, receive, counted)


def refused(path: str, error: Refused) -> JSONResponse:
    """An error as the API of `path` has it."""
    shape = a1111_api.error if path.startswith("/sdapi/") else openai_api.error
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}, 503: {"Retry-After": "30"}}
    return JSONResponse(shape(error), error.status, headers=headers.get(error.status))


async def _on_refused(http: HttpRequest, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = Refused(error.detail, error.status_code)
    if isinstance(error, ClientDisconnect):
        error = Refused("the client has gone", 400)
    known = isinstance(error, Refused)
    return refused(http.url.path, error if known else Refused("an error of the server: its log says more", 500))


def make(
    models: Mapping[str, Served],
    *,
    limits: Limits,
    waiting: int = 64,
    batch_size: int = 1,
    token: str | None = None,
    hosts: tuple[str, ...] = LOCAL,
) -> Starlette:
    """The application over `models`, whose first one is the default. Its device works from start-up to shutdown.

    waiting: pictures in the queue at most. batch_size: see `Device`. token: None for none. hosts: names that a request
    may call the server by, ("*",) for all; the default keeps foreign pages from reaching a local server by DNS."""
    queue = Queue(waiting)
    metrics = Metrics(queue)
    device = Device(models, queue, metrics, batch_size)
    server = Server(models, limits, queue, metrics, device, next(iter(models)))

    @contextlib.asynccontextmanager
    async def lifespan(app):
        device.start()
        yield
        queue.close()
        await run_in_threadpool(device.join)

    text = resources.files("flaxkd.serve").joinpath("page.html").read_text(encoding="utf-8")
    inline = lambda tag: base64.b64encode(
        hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1].encode()).digest()
    ).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{inline('script')}'; style-src 'sha256-{inline('style')}'; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    app = Starlette(
        routes=[*ROUTES, *openai_api.ROUTES, *a1111_api.ROUTES],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(Door, server=server, token=token, policy=policy),
        ],
        exception_handlers=dict.fromkeys((Refused, HTTPException, ClientDisconnect, Exception), _on_refused),
        lifespan=lifespan,
    )
    app.state.server, app.state.page = server, text
    return app
