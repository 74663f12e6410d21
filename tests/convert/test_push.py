"""--push_to_hub, as a process of its own, against a stand-in for the hub on this machine."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flaxkd import pretrained
from tests.running import ROOT

TOKEN = "hf_0123456789"


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub to make a repository and to commit a folder to it."""

    protocol_version = "HTTP/1.1"

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub, address = self.server, f"http://127.0.0.1:{self.server.server_port}"
        if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", None):
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            hub.created = json.loads(body)
            self.answer({"url": f"{address}/me/student"})
        elif self.path == "/api/models/me/student/preupload/main":
            files = json.loads(body)["files"]
            mode = lambda path: "lfs" if path.endswith(".safetensors") else "regular"
            self.answer({"files": [
                {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files
            ]})  # fmt: skip
        elif self.path == "/me/student.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            put = lambda oid: {"upload": {"href": f"{address}/put/{oid}", "header": {}}}
            self.answer({"transfer": "basic", "objects": [o | {"actions": put(o["oid"])} for o in wanted]})
        elif self.path == "/api/models/me/student/commit/main":
            hub.commit = [json.loads(line) for line in body.splitlines()]
            self.answer({"success": True, "commitUrl": f"{address}/me/student/commit/1", "commitOid": "1"})
        else:
            self.answer({}, 200)  # whether the model card is valid, and the like

    def do_PUT(self):
        oid = self.path.rpartition("/")[2]
        self.server.files[oid] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        else:
            self.answer({"id": "me/student", "sha": "0", "siblings": []})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.created, server.commit = {}, None, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def command(tiny_pipeline, tmp_path, hub):
    """(token) -> (the finished process, the folder that it was to write)."""
    from convert import from_diffusers

    from_diffusers.convert(str(tiny_pipeline), tmp_path / "workdir")

    def run(token: str):
        out = tmp_path / "out"
        arguments = ["--workdir", str(tmp_path / "workdir"), "--out", str(out), "--push_to_hub", "me/student"]
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_TOKEN": token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        done = subprocess.run(
            [sys.executable, "-m", "convert.to_diffusers", *arguments, "--private"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        return done, out

    return run


def test_the_whole_folder_arrives(command, hub):
    done, out = command(TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"uploaded to http://127.0.0.1:{hub.server_port}/me/student" in done.stdout
    assert hub.created["name"] == "student" and hub.created["organization"] == "me"
    assert "private" in (
        hub.created.get("visibility"),
        *(name for name in hub.created if hub.created[name] is True),
    )
    values = [entry["value"] for entry in hub.commit if entry["key"] in ("file", "lfsFile")]
    assert {v["path"] for v in values} == {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    for entry in hub.commit:
        value = entry["value"]
        if entry["key"] == "file":
            assert base64.b64decode(value["content"]) == (out / value["path"]).read_bytes()
        elif entry["key"] == "lfsFile":
            data = (out / value["path"]).read_bytes()
            assert value["oid"] == hashlib.sha256(data).hexdigest() and hub.files[value["oid"]] == data
    assert sum(entry["key"] == "lfsFile" for entry in hub.commit) == len(pretrained.FAMILIES["sd1"].parts)


def test_without_a_login_nothing_is_written(command, hub):
    done, out = command("hf_wrong")
    assert done.returncode == 1 and "hf auth login" in done.stderr and "Traceback" not in done.stderr
    assert not out.exists() and not hub.commit
