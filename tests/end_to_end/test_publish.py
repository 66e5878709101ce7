"""What `--push-to-hub` uploads, against a stand-in of the hub's interface; no network is asked."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from wegeft_cli.errors import UserError
from wegeft_cli.publishing.hub import HubTarget


class StandIn(ThreadingHTTPServer):
    """As much of the hub as an upload asks for: who am I, a repository, LFS, a commit."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {}
        self.files = {}
        self.blobs = {}
        self.asked = []
        self.fail_commit = False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, value, status=200, headers=()):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers:
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        server, path = self.server, self.path.partition("?")[0]
        server.asked.append(f"{self.command} {path}")
        body = self.read()
        if self.command == "PUT":
            server.blobs[path.rpartition("/")[2]] = body
            return self.answer({})
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid token"}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "orgs": []})
        if path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told.get('organization') or 'me'}/{told['name']}"
            server.repos.setdefault(name, told)
            return self.answer({"url": f"{server.url}/{name}"})
        if path.endswith("/preupload/main"):
            files = [
                {"path": each["path"], "uploadMode": "lfs" if "safetensors" in each["path"]
                 else "regular", "shouldIgnore": False, "oid": None}
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{server.url}/blob/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            if server.fail_commit:
                return self.answer({"error": "out of order"}, 500)
            self.commit(body)
            name = re.match(r"/api/models/(.*)/commit/", path)[1]
            return self.answer(
                {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{server.url}/{name}/commit/{40 * '0'}",
                }
            )
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/revision/" in path or path.startswith("/api/models/"):
            return self.answer({"id": "me/mine", "sha": "1" * 40, "siblings": []})
        return self.answer({"error": f"no such page {path}"}, 404)

    def commit(self, body):
        for line in body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]

    do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815


@pytest.fixture
def hub():
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run_cli(hub, tmp_path):
    """A function: the command in a process of its own, which asks the stand-in alone."""

    def run(*words, token="hf_right", offline="0"):
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": offline,
            "HF_TOKEN": token,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [sys.executable, "-m", "wegeft_cli", *map(str, words)],
            env=environment, capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip

    return run


def is_private(told):
    """The hub's client said `private` once, and says `visibility` now."""
    assert told.keys() & {"private", "visibility"}
    return told.get("visibility", "private" if told.get("private") else "public") == "private"


def assert_uploaded(hub, folder):
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert len(files) >= 3
    assert {k: v for k, v in hub.files.items() if k != ".gitattributes"} == files
    weights = next(name for name in files if name.endswith(".safetensors"))
    assert hashlib.sha256(files[weights]).hexdigest() in hub.blobs


def test_a_merged_model_is_pushed(hub, run_cli, llama_dir, make_adapter):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    done = run_cli("merge", folder, "--push-to-hub", "me/mine", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["url"] == f"{hub.url}/me/mine"
    assert is_private(hub.repos["me/mine"])
    assert_uploaded(hub, folder.with_name("mine-merged"))
    # A path is no base that others have, and a hub refuses it.
    assert "base_model:" not in hub.files["README.md"].decode()


@pytest.mark.slow
def test_a_twin_is_pushed_and_can_be_public(hub, run_cli, llama_dir, make_adapter):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    done = run_cli("export", folder, "--no-parity", "--push-to-hub", "team/mine", "--public")
    assert done.returncode == 0, done.stderr
    assert f"hub: {hub.url}/team/mine" in done.stdout
    assert not is_private(hub.repos["team/mine"])
    assert_uploaded(hub, folder.with_name("mine-lora"))


@pytest.mark.slow
def test_a_trained_adapter_is_pushed(hub, run_cli, write_recipe, tmp_path):
    done = run_cli("train", write_recipe(), "--push-to-hub", "me/mine", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["url"] == f"{hub.url}/me/mine"
    assert_uploaded(hub, tmp_path / "runs" / "tiny" / "adapter")


@pytest.mark.slow
def test_what_stops_an_upload_is_told_before_the_work(
    hub, run_cli, llama_dir, make_adapter, tmp_path
):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    words = ["merge", folder, "--output", tmp_path / "out", "--push-to-hub"]
    for name, settings, message in [
        ("me/mine", {"token": "hf_wrong"}, "does not let you write"),
        ("me/mine", {"offline": "1"}, "switched off"),
        ("a/b/c", {}, "no name of a repository"),
    ]:
        done = run_cli(*words, name, **settings)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert not (tmp_path / "out").exists()
    assert not hub.files
    done = run_cli("merge", folder, "--public")
    assert done.returncode == 2
    assert "requires --push-to-hub" in done.stderr


@pytest.mark.slow
def test_a_failing_upload_keeps_what_was_written(hub, run_cli, llama_dir, make_adapter, tmp_path):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"])
    hub.fail_commit = True
    out = tmp_path / "out"
    done = run_cli("export", folder, "-o", out, "--no-parity", "--push-to-hub", "me/mine")
    assert done.returncode == 1, done.stderr
    assert "hf upload me/mine" in " ".join(done.stderr.split())
    assert (out / "adapter_model.safetensors").is_file()


def test_the_hub_of_the_tests_is_switched_off():
    with pytest.raises(UserError, match="switched off"):
        HubTarget("me/mine").check()
