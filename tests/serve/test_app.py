"""The three APIs on a tiny pipeline, through HTTP."""

import base64
import io
import json
import time

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from flaxkd.serve import app
from tests.serve.conftest import LIMITS, WAITING
from tests.serve.test_requests import png

ASK = {"prompt": "red apple", "seed": 3, "steps": 2, "guidance": 3.0}


def until_done(client, job: dict) -> dict:
    """The last of a job's events."""
    with client.stream("GET", f"/api/jobs/{job['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: ")]
    assert [each["steps_done"] for each in found] == sorted(each["steps_done"] for each in found)
    return found[-1]


def pictures(client, job: dict) -> list[bytes]:
    return [client.get(path).content for path in until_done(client, job)["pictures"]]


def test_a_job_from_its_request_to_its_picture(client):
    answer = client.post("/api/jobs", json=ASK)
    assert answer.status_code == 202
    done = until_done(client, answer.json())
    assert done["state"] == "completed" and done["steps_done"] == done["steps"] == 3  # pndm calls the UNet once more
    assert done["seconds"] > 0 and done["error"] is None
    answer = client.get(done["pictures"][0])
    image = Image.open(io.BytesIO(answer.content))
    assert answer.headers["content-type"] == "image/png" and image.size == (32, 32) and np.std(image) > 10
    assert image.text["prompt"] == "red apple" and image.text["seed"] == "3" and image.text["model"] == "teacher"


def test_the_same_seed_gives_the_same_bytes_alone_and_beside_others(client):
    alone = [pictures(client, client.post("/api/jobs", json=ASK | {"seed": seed}).json())[0] for seed in (3, 4)]
    client.post("/api/jobs", json=ASK | {"steps": 20, "sampler": "ddim"})  # keeps the device busy
    others = [ASK | {"prompt": "grinning face", "seed": 8, "guidance": 9.0}, ASK | {"count": 2}]
    jobs = [client.post("/api/jobs", json=each).json() for each in others]
    beside = until_done(client, jobs[1])
    assert beside["batch"] == 3
    assert [client.get(path).content for path in beside["pictures"]] == alone
    assert alone[0] != alone[1]


def test_samplers_with_noise_and_images_need_no_program_of_their_own(client):
    import jax

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    try:
        for more in ({"sampler": "ddpm"}, {"image": png(), "strength": 0.5, "steps": 4}, {"guidance": 1.0}):
            assert until_done(client, client.post("/api/jobs", json=ASK | more).json())["state"] == "completed"
    finally:
        jax.monitoring.clear_event_listeners()
    assert not compiled


def test_a_cancelled_job_stops_between_two_steps(client):
    job = client.post("/api/jobs", json=ASK | {"steps": 20, "count": 6}).json()
    assert client.post(f"/api/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    last = until_done(client, job)
    assert last["pictures"] == [] and last["steps_done"] < last["steps"]
    assert client.post("/api/jobs", json=ASK).status_code == 202  # and the next one is taken


def test_a_full_queue_answers_429(client):
    answers = [client.post("/api/jobs", json=ASK | {"steps": 20, "count": 6}) for _ in range(6)]
    assert {answer.status_code for answer in answers} == {202, 429}
    full = next(answer for answer in answers if answer.status_code == 429)
    assert full.headers["retry-after"] == "5" and f"at most {WAITING} may" in full.json()["error"]["message"]
    for answer in answers:
        if answer.status_code == 202:
            client.post(f"/api/jobs/{answer.json()['id']}/cancel")


def test_openai(client):
    body = {"model": "student", "prompt": "red apple", "n": 2, "size": "32x32", "quality": "hd", "steps": 2, "seed": 3}
    answer = client.post("/v1/images/generations", json=body).json()
    assert [one["seed"] for one in answer["data"]] == [3, 4] and answer["size"] == "32x32"
    for one in answer["data"]:
        assert client.get(one["url"]).content == base64.b64decode(one["b64_json"])
    only = client.post("/v1/images/generations", json=body | {"response_format": "b64_json"}).json()["data"][0]
    assert only == {"seed": 3, "b64_json": answer["data"][0]["b64_json"]}
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["teacher", "student"]
    assert client.get("/v1/models/student").json()["object"] == "model"
    wrong = client.post("/v1/images/generations", json={"prompt": "x", "model": "dall-e-3"})
    assert wrong.status_code == 404 and wrong.json()["error"]["code"] == "model_not_found"
    assert client.post("/v1/images/generations", json={"prompt": "x", "size": "big"}).json()["error"]["param"] == "size"


def test_a1111(client):
    body = {"prompt": "red apple", "negative_prompt": "blue", "steps": 2, "cfg_scale": 3, "seed": 3, "width": 32}
    body |= {"sampler_name": "DPM++ 2M Karras", "batch_size": 2, "n_iter": 1, "restore_faces": True, "tiling": False}
    body |= {"override_settings": {"sd_model_checkpoint": "student", "CLIP_stop_at_last_layers": 2}}
    body |= {"alwayson_scripts": {"controlnet": {"args": []}}}
    answer = client.post("/sdapi/v1/txt2img", json=body).json()
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [3, 4] and info["sampler_name"] == "dpmsolver++:karras"
    assert info["sd_model_name"] == "student" and info["cfg_scale"] == 3
    assert info["ignored"] == ["restore_faces", "alwayson_scripts", "override_settings.CLIP_stop_at_last_layers"]
    assert len(answer["images"]) == 2 and Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).size == (32, 32)
    assert "Steps: 2, Sampler: dpmsolver++:karras, CFG scale: 3.0, Seed: 4" in info["infotexts"][1]
    body = {"prompt": "x", "init_images": [png()], "denoising_strength": 0.5, "steps": 4, "sampler_name": "Euler a"}
    answer = client.post("/sdapi/v1/img2img", json=body).json()
    assert json.loads(answer["info"])["denoising_strength"] == 0.5 and "init_images" not in answer["parameters"]
    names = [each["name"] for each in client.get("/sdapi/v1/samplers").json()]
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= {*names}
    assert [each["title"] for each in client.get("/sdapi/v1/sd-models").json()] == ["teacher", "student"]
    assert client.get("/sdapi/v1/progress").json()["progress"] == 0.0
    assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "student"}).status_code == 200
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "student"
    assert client.post("/api/jobs", json=ASK).json()["model"] == "student"
    client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "teacher"})
    wrong = client.post("/sdapi/v1/txt2img", json={"prompt": "x", "sampler_name": "nosuch"})
    assert wrong.status_code == 422 and "'nosuch' is unknown" in wrong.json()["detail"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": NaN}', 400),
        (b'{"prompt": "x", "eta": 1e999}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"seed": ' + b"9" * 10_000 + b"}", 400),
        (b'{"prompt": "x", "steps": 1e300}', 422),
        (b'{"prompt": {"a": [1]}}', 422),
        (b'{"prompt": "x", "seed": ["1"]}', 422),
        (b'"' + b"x" * (2**20 + 1) + b'"', 413),
    ],
)
@pytest.mark.parametrize("path", ["/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/img2img"])
def test_hostile_bodies_are_refused(client, path, data, status):
    answer = client.post(path, content=data, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json().get("error")


def test_a_form_of_a_foreign_page_and_a_foreign_host_are_refused(client):
    assert client.post("/api/jobs", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.get("/", headers={"host": "rebound.example"}).status_code == 400
    assert "access-control-allow-origin" not in client.get("/").headers


def test_nothing_is_found_by_path(client):
    files = ("/../etc/passwd", "/api/jobs/..%2f..%2fsecret", "/api/jobs/x/pictures/0", "/static/x", "/v1/models/../x")
    for path in files:
        answer = client.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["message"]


def test_metrics(client):
    until_done(client, client.post("/api/jobs", json=ASK).json())
    text = client.get("/metrics").text
    assert 'flaxkd_pictures_total{model="teacher"}' in text and "flaxkd_waiting_pictures 0.0" in text
    assert 'flaxkd_answers_total{path="/api/jobs",status="202"}' in text


def test_the_page_runs_its_own_script_alone(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.headers["content-type"].startswith("text/html") and "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy and "unsafe" not in policy
    assert 'src="http' not in answer.text and "//cdn" not in answer.text


def test_a_token_and_the_end(models):
    made = app.make(models, limits=LIMITS, token="secret", batch_size=4)
    with TestClient(made, raise_server_exceptions=False) as client:
        assert client.get("/healthz").status_code == client.get("/").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic !"}):
            answer = client.post("/api/jobs", json=ASK, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/metrics").status_code == 401
        assert client.get("/sdapi/v1/samplers", auth=("anybody", "secret")).status_code == 200
        bearer = {"authorization": "Bearer secret"}
        begun = client.post("/api/jobs", json=ASK | {"steps": 20}, headers=bearer).json()
        queue = made.state.server.queue
        end = time.time() + 60
        while queue.jobs[begun["id"]].state == "queued":
            assert time.time() < end
            time.sleep(0.01)
    assert queue.jobs[begun["id"]].state == "completed"  # the end has waited for it
    assert not made.state.server.device.is_alive()
