"""OpenAI's images: POST /v1/images/generations, GET /v1/models.

`client.images.generate(prompt=...)` works as it is. What OpenAI's API has no field for is given beside its own fields,
in the client by `extra_body`: negative_prompt, steps, sampler, guidance, seed.
"""

import base64
import re
import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flaxkd.serve.requests import Refused

OWN = ("model", "prompt", "negative_prompt", "steps", "sampler", "guidance", "seed")  # the same in both
IGNORED = ("quality", "style", "background", "moderation", "user", "output_compression", "partial_images")
# {status of HTTP: type of OpenAI's error}; any other one is a request that was wrong
TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def error(refused: Refused) -> dict[str, Any]:
    kind = TYPES.get(refused.status, "invalid_request_error")
    code = "model_not_found" if refused.field == "model" and refused.status == 404 else None
    return {"error": {"message": str(refused), "type": kind, "param": refused.field, "code": code}}


def fields(body: dict[str, Any]) -> dict[str, Any]:
    """Those of `requests.checked`. Raises Refused."""
    form = body.get("response_format")
    if form not in (None, "url", "b64_json"):
        raise Refused("response_format must be url or b64_json", field="response_format")
    if body.get("output_format") not in (None, "png"):
        raise Refused("output_format must be png", field="output_format")
    if body.get("stream"):
        raise Refused("pictures are not streamed: POST /api/jobs has the progress", field="stream")
    known = {*OWN, *IGNORED, "n", "size", "response_format", "output_format", "stream"}
    if unknown := [name for name in body if name not in known]:
        raise Refused(f"{str(unknown[0])[:80]!r} is no field", field=str(unknown[0])[:80])
    found = {name: body[name] for name in OWN if body.get(name) is not None}
    if body.get("n") is not None:
        found["count"] = body["n"]
    size = body.get("size")
    if size not in (None, "auto"):
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) if isinstance(size, str) else None
        if match is None:
            raise Refused('size must be "WIDTHxHEIGHT" or "auto"', field="size")
        found |= {"width": int(match[1]), "height": int(match[2])}
    return found


async def generate(http: HttpRequest) -> Response:
    server = http.app.state.server
    body = await server.body(http)
    job = await server.finished(await server.submit(fields(body), "openai"), http)
    form, data = body.get("response_format"), []
    for i, png in enumerate(job.pictures):
        one = {"seed": job.request.seed + i}
        if form != "b64_json":
            one["url"] = f"{http.base_url}api/jobs/{job.id}/pictures/{i}"
        if form != "url":
            one["b64_json"] = base64.b64encode(png).decode()
        data.append(one)
    return JSONResponse({
        "created": int(job.created), "data": data, "output_format": "png",
        "size": f"{job.request.width}x{job.request.height}",
    })  # fmt: skip


def _described(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "flaxkd"}


async def models(http: HttpRequest) -> Response:
    names = http.app.state.server.models
    return JSONResponse({"object": "list", "data": [_described(name) for name in names]})


async def model(http: HttpRequest) -> Response:
    name = http.path_params["name"]
    if name not in http.app.state.server.models:
        raise Refused(f"model {name!r} is not served", 404, "model")
    return JSONResponse(_described(name))


ROUTES = [
    Route("/v1/images/generations", generate, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
]
