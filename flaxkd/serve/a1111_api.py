"""The API of AUTOMATIC1111's web UI: txt2img, img2img, progress, interrupt, samplers, schedulers, models, options.

Fields that mean nothing here are ignored, and named as "ignored" in the `info` of the answer.
"""

import base64
import json
import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flaxkd.diffusion import samplers
from flaxkd.serve.jobs import Job
from flaxkd.serve.requests import Refused

# {A1111's name: ours}
SAMPLERS = {
    "DPM++ 2M": "dpmsolver++",
    "DPM++ 2M SDE": "sde-dpmsolver++",
    "UniPC": "unipc",
    "DEIS": "deis",
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "PLMS": "pndm",
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "DPM2": "dpm2",
    "LMS": "lms",
    "LCM": "lcm",
}
SAME = {  # {A1111's field: ours}
    "prompt": "prompt", "negative_prompt": "negative_prompt", "width": "width", "height": "height", "steps": "steps",
    "cfg_scale": "guidance", "seed": "seed",
}  # fmt: skip
USED = {*SAME, "sampler_name", "sampler_index", "scheduler", "batch_size", "n_iter", "override_settings"}
SAID = {"send_images", "save_images", "do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards"}
EMPTY = (None, False, 0, -1, "", [], {})  # a field with such a value asks for nothing


def error(refused: Refused) -> dict[str, Any]:
    return {"error": "Refused", "detail": str(refused), "errors": str(refused), "body": refused.field or ""}


def sampler(name: Any, scheduler: Any) -> str | None:
    """Ours, of A1111's name with or without the spacing ("DPM++ 2M Karras"), or of our own. Raises Refused."""
    if not name:
        return None
    words, spacing = str(name)[:80], str(scheduler or "").lower()
    own = {ours: ours for ours in samplers.KINDS} | {theirs.lower(): ours for theirs, ours in SAMPLERS.items()}
    for suffix in samplers.SPACINGS:
        if words.lower().endswith(f" {suffix}"):
            words, spacing = words[: -len(suffix) - 1], suffix
    found = own.get(words.lower(), words)
    if spacing in samplers.SPACINGS:
        found = f"{found}:{spacing}"
    try:
        return samplers.name_of(found)
    except ValueError as wrong:
        raise Refused(str(wrong), field="sampler_name") from None


def fields(body: dict[str, Any], *, images: bool) -> tuple[dict[str, Any], list[str]]:
    """(those of `requests.checked`, names of what is ignored). Raises Refused."""
    found = {ours: body[theirs] for theirs, ours in SAME.items() if body.get(theirs) is not None}
    found["sampler"] = sampler(body.get("sampler_name") or body.get("sampler_index"), body.get("scheduler"))
    counts = [body.get(name) or 1 for name in ("batch_size", "n_iter")]
    if any(type(count) is not int or not 1 <= count <= 100 for count in counts):
        raise Refused("batch_size and n_iter must be whole numbers from 1 on", field="batch_size")
    found["count"] = counts[0] * counts[1]
    settings = body.get("override_settings") or {}
    if not isinstance(settings, dict):
        raise Refused("override_settings must be an object", field="override_settings")
    if model := settings.get("sd_model_checkpoint"):
        found["model"] = model
    used = USED
    if images:
        used = USED | {"init_images", "denoising_strength"}
        pictures = body.get("init_images")
        if not isinstance(pictures, list) or len(pictures) != 1:
            raise Refused("init_images must be a list of one picture in base64", field="init_images")
        strength = body.get("denoising_strength")
        found |= {"image": pictures[0], "strength": 0.75 if strength is None else strength}  # 0.75 is A1111's
    ignored = [name for name, value in body.items() if name not in used | SAID and value not in EMPTY]
    ignored += [f"override_settings.{name}" for name in settings if name != "sd_model_checkpoint"]
    return found, [str(name)[:80] for name in ignored][:100]


def line(settings: dict[str, str]) -> str:
    """Settings as A1111 writes them below a picture."""
    names = {"num_inference_steps": "Steps", "sampler": "Sampler", "guidance_scale": "CFG scale", "seed": "Seed"}
    rest = [f"{title}: {settings[name]}" for name, title in names.items()]
    rest += [f"Size: {settings['width']}x{settings['height']}", f"Model: {settings['model']}"]
    rest += [f"Denoising strength: {value}" for name, value in settings.items() if name == "strength"]
    return f"{settings['prompt']}\nNegative prompt: {settings['negative_prompt']}\n{', '.join(rest)}"


def info(job: Job, ignored: list[str]) -> dict[str, Any]:
    request, n = job.request, job.request.count
    seeds = [request.seed + i for i in range(n)]
    negative = request.negative_prompt or ""
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * n,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * n,
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * n,
        "subseed_strength": 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": request.sampler,
        "cfg_scale": request.guidance,
        "steps": request.steps,
        "batch_size": n,
        "denoising_strength": request.strength,
        "sd_model_name": request.model,
        "infotexts": [line(request.info(i)) for i in range(n)],
        "index_of_first_image": 0,
        "seconds": round(job.seconds, 4),
        "ignored": ignored,
    }


def drawn(*, images: bool):
    async def answer(http: HttpRequest) -> Response:
        server = http.app.state.server
        body = await server.body(http)
        asked, ignored = fields(body, images=images)
        job = await server.finished(await server.submit(asked, "a1111"), http)
        pictures = [base64.b64encode(png).decode() for png in job.pictures]
        parameters = {name: value for name, value in body.items() if name != "init_images"}
        return JSONResponse({"images": pictures, "parameters": parameters, "info": json.dumps(info(job, ignored))})

    return answer


def _under_way(http: HttpRequest) -> list[Job]:
    return [job for job in http.app.state.server.queue.jobs.values() if job.origin == "a1111" and not job.done.done()]


async def progress(http: HttpRequest) -> Response:
    jobs = _under_way(http)
    job = next((each for each in jobs if each.state == "generating"), None)
    share = 0.0 if job is None else min(job.steps_done / job.steps, 1.0)
    took = 0.0 if job is None else time.time() - job.started
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "" if job is None else job.id,
        "job_count": len(jobs),
        "job_no": 0,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(job.started if job else None)),
        "sampling_step": 0 if job is None else int(share * len(job.request.schedule.timesteps)),
        "sampling_steps": 0 if job is None else len(job.request.schedule.timesteps),
    }
    left = took / share - took if share else 0.0
    return JSONResponse(
        {"progress": share, "eta_relative": left, "state": state, "current_image": None, "textinfo": None}
    )


async def interrupt(http: HttpRequest) -> Response:
    """Of all jobs that came by this API, as in A1111."""
    for job in _under_way(http):
        http.app.state.server.queue.cancel(job)
    return JSONResponse({})


async def list_samplers(http: HttpRequest) -> Response:
    return JSONResponse([{"name": name, "aliases": [ours], "options": {}} for name, ours in SAMPLERS.items()])


async def list_schedulers(http: HttpRequest) -> Response:
    names = ["automatic", *samplers.SPACINGS]
    return JSONResponse([{"name": name, "label": name.capitalize(), "aliases": None} for name in names])


async def list_models(http: HttpRequest) -> Response:
    """Without their files: where they lie is nobody's business."""
    names = http.app.state.server.models
    return JSONResponse([
        {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
        for name in names
    ])  # fmt: skip


async def options(http: HttpRequest) -> Response:
    return JSONResponse({"sd_model_checkpoint": http.app.state.server.default, "samples_format": "png"})


async def set_options(http: HttpRequest) -> Response:
    """The model of requests that name none, for all clients, as in A1111. Other options are ignored."""
    server = http.app.state.server
    name = (await server.body(http)).get("sd_model_checkpoint")
    if name is not None:
        if not isinstance(name, str) or name not in server.models:
            raise Refused(f"this model is not served (served: {', '.join(server.models)})", 404, "sd_model_checkpoint")
        server.default = name
    return JSONResponse({})


async def nothing(http: HttpRequest) -> Response:
    return JSONResponse([])


_at = lambda path, endpoint, *methods: Route(f"/sdapi/v1/{path}", endpoint, methods=methods or ("GET",))
ROUTES = [
    _at("txt2img", drawn(images=False), "POST"),
    _at("img2img", drawn(images=True), "POST"),
    _at("progress", progress),
    _at("interrupt", interrupt, "POST"),
    _at("samplers", list_samplers),
    _at("schedulers", list_schedulers),
    _at("sd-models", list_models),
    _at("options", options),
    _at("options", set_options, "POST"),
    *(_at(name, nothing) for name in ("upscalers", "loras", "sd-vae", "hypernetworks", "prompt-styles")),
]
