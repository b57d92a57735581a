"""A stand-in for the Hugging Face hub on the loopback: what huggingface_hub asks of it to push and to fetch a model."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import yaml
from huggingface_hub import constants, hf_api

from steer_heal.gate.servers import send, serving

TOKEN = "hf_good"
COMMIT = "c" * 40
LARGE = (".safetensors", ".gguf")


@dataclass
class Repository:
    private: bool = True
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """Models by name. `dies` is a part of an address: the line is cut when it is asked; `says` is answered there."""

    models: dict[str, Repository] = field(default_factory=dict)
    dies: str = "never"
    says: int = 0
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.closed = threading.Event()

    def reply(self, handler, sent):
        path = unquote(handler.path.partition("?")[0]).removeprefix("/")
        self.asked.append(f"{handler.command} {path}")
        if self.dies in path:
            if self.says:
                return send(handler, '{"error": "no"}', self.says)
            return handler.connection.close()
        guarded = path == "api/whoami-v2" or (handler.command == "POST")
        if guarded and handler.headers.get("Authorization") != f"Bearer {TOKEN}":
            return send(handler, '{"error": "Invalid username or password."}', 401)
        for pattern, answer in ANSWERS.items():
            if found := re.fullmatch(pattern, f"{handler.command} {path}"):
                return answer(self, handler, sent, *found.groups())
        return send(handler, "{}", 404)


def missing(handler):
    handler.send_response(404)
    handler.send_header("X-Error-Code", "RepoNotFound")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def as_json(handler, value):
    send(handler, json.dumps(value))


def model(hub, handler, sent, name):
    if (there := hub.models.get(name)) is None:
        return missing(handler)
    _, front, *_ = [*there.files.get("README.md", b"").decode().split("---\n", 2), ""]
    siblings = [{"rfilename": file} for file in there.files]
    about = {"id": name, "sha": COMMIT, "private": there.private, "siblings": siblings}
    as_json(handler, about | {"cardData": yaml.safe_load(front)})


def create(hub, handler, sent):
    name = f"{sent.get('organization') or 'me'}/{sent['name']}"
    private = sent.get("private") or sent.get("visibility") == "private"
    hub.models.setdefault(name, Repository(private, {".gitattributes": b""}))
    as_json(handler, {"url": f"http://{handler.headers['Host']}/{name}", "name": name})


def check_card(hub, handler, sent):
    front = yaml.safe_load(sent["content"].split("---")[1])
    base = front.get("base_model")
    wrong = base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base)
    as_json(handler, {"errors": [{"message": f'"base_model" {base} is no model id'}] if wrong else [], "warnings": []})


def modes(hub, handler, sent, name):
    if name not in hub.models:
        return missing(handler)
    names = [file["path"] for file in sent["files"]]
    kinds = [{"path": n, "uploadMode": "lfs" if n.endswith(LARGE) else "regular", "shouldIgnore": False} for n in names]
    as_json(handler, {"files": kinds})


def places(hub, handler, sent, name):
    where = f"http://{handler.headers['Host']}/large/"
    objects = [{**one, "actions": {"upload": {"href": where + one["oid"]}}} for one in sent["objects"]]
    send(handler, json.dumps({"transfer": "basic", "objects": objects}), 200, "application/vnd.git-lfs+json")


def put(hub, handler, sent, oid):
    assert hashlib.sha256(sent).hexdigest() == oid
    hub.large[oid] = sent
    as_json(handler, {})


def commit(hub, handler, sent, name):
    if name not in hub.models:
        return missing(handler)
    rows = [json.loads(line) for line in sent.splitlines()]
    files = {row["value"]["path"]: base64.b64decode(row["value"]["content"]) for row in rows if row["key"] == "file"}
    large = {row["value"]["path"]: hub.large[row["value"]["oid"]] for row in rows if row["key"] == "lfsFile"}
    hub.models[name].files |= files | large
    url = f"http://{handler.headers['Host']}/{name}/commit/{COMMIT}"
    as_json(handler, {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})


def resolve(hub, handler, sent, method, name, file):
    if name not in hub.models:
        return missing(handler)
    content = hub.models[name].files.get(file)
    handler.send_response(404 if content is None else 200)
    if content is None:
        handler.send_header("X-Error-Code", "EntryNotFound")
    handler.send_header("X-Repo-Commit", COMMIT)
    handler.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
    handler.send_header("Content-Length", str(len(content or b"")))
    handler.end_headers()
    if method == "GET":
        handler.wfile.write(content or b"")


ANSWERS = {
    r"GET api/whoami-v2": lambda hub, handler, sent: as_json(handler, {"name": "me", "type": "user", "orgs": []}),
    r"GET api/models/([^/]+/[^/]+)": model,
    r"POST api/repos/create": create,
    r"POST api/validate-yaml": check_card,
    r"POST api/models/([^/]+/[^/]+)/preupload/main": modes,
    r"POST ([^/]+/[^/]+)\.git/info/lfs/objects/batch": places,
    r"PUT large/(\w+)": put,
    r"POST api/models/([^/]+/[^/]+)/commit/main": commit,
    r"(GET|HEAD) ([^/]+/[^/]+)/resolve/\w+/(.+)": resolve,
}


@contextmanager
def hub_at(hub: Hub, cache: Path, monkeypatch, token: str | None = TOKEN):
    """Point huggingface_hub at this hub, with an empty cache and a token of its own."""
    with serving(hub) as url:
        old, new = constants.ENDPOINT, url.removesuffix("/v1")
        monkeypatch.setattr(constants, "ENDPOINT", new)
        monkeypatch.setattr(hf_api.api, "endpoint", new)  # the client that was made at the import
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(old, new)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is another protocol
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        yield hub
