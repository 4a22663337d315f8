"""A Hub on 127.0.0.1, so that the tests run the unmodified client over a real socket and never leave the machine.

It holds model, dataset and space repos in memory and answers the calls that `huggingface_hub`, `transformers` and
`datasets` make to create, upload, list, download and delete them. Each repo has one branch, `main`. Whoever sends
`TOKEN` owns everything; whoever does not may read what is public. The client reads its environment at import, so it
runs in a process of its own:

    def client():
        from huggingface_hub import HfApi
        HfApi().create_repo("org/name")

    with LoopbackHub() as hub:
        hub.run(client, tmp_path)
        assert hub.files("org/name") == {}
"""

import base64
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_loopback"
USER = "loopback"
REGULAR_LIMIT = 10 * 1024 * 1024  # a text file above this size goes through LFS, as on the Hub


@dataclass
class File:
    """The content of one file; `lfs` says how it was uploaded, and so which hash is its ETag."""

    content: bytes
    lfs: bool

    @cached_property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @cached_property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.lfs else self.git_oid

    def describe(self, path: str) -> dict:
        """The entry of a listing: tree and repo info have different words for the same facts."""
        size = len(self.content)
        entry = {"type": "file", "path": path, "rfilename": path, "size": size}
        entry |= {"oid": self.git_oid, "blobId": self.git_oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.etag, "sha256": self.etag, "size": size, "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    """The history of one branch. Its first commit is empty, so that a new repo has a revision to point at."""

    private: bool
    history: list[Commit] = field(default_factory=list)

    def commit(self, title: str, files: dict[str, File]) -> Commit:
        parent = self.history[-1].oid if self.history else ""
        names = [f"{path} {file.etag}" for path, file in sorted(files.items())]
        oid = hashlib.sha1("\n".join([parent, title, *names]).encode()).hexdigest()
        self.history.append(Commit(oid, title, files))
        return self.history[-1]


class LoopbackHub:
    """A context manager: the server runs, on a port of its own, between enter and exit."""

    def __init__(self):
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}  # by SHA-256: uploaded before the commit that names them
        self.outside: list[str] = []  # what clients tried to reach elsewhere; a test can assert that it is empty
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.hub = self
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def env(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """The whole environment for a client process that keeps its cache under `home`; `token=None` is anonymous.

        The hub is also the proxy for every other host. So what does not heed `HF_ENDPOINT` ends here too: it is
        refused, noted in `outside`, and no host name is looked up.
        """
        foreign = re.compile(r"HF_|HUGGING|TRANSFORMERS_|.*_proxy$", re.IGNORECASE)
        env = {key: value for key, value in os.environ.items() if not foreign.match(key)}
        env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), self.url)
        env |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1")
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # with hf_xet installed, large files would not use the LFS calls
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # else datasets reports each load to a host that no setting moves
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        return env if token is None else env | {"HF_TOKEN": token}

    def run(self, client: Callable[[], None], folder: Path, token: str | None = TOKEN) -> str:
        """Runs the source of the function `client` in a process of its own, in `folder`; returns what it printed.

        So `client` imports what it uses, and knows nothing of the test around it. Its cache is in `folder` too: a
        second client finds there what the first has downloaded.
        """
        script = folder / f"{client.__name__}.py"
        script.write_text(f"{textwrap.dedent(inspect.getsource(client))}\n\n{client.__name__}()\n", encoding="utf-8")
        command, env = [sys.executable, str(script)], self.env(folder / "hf_home", token)
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0, f"{client.__name__} failed:\n{done.stderr}"
        return done.stdout

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """What the repo holds now: content by path."""
        with self.lock:
            latest = self.repos[repo_type, repo_id].history[-1]
            return {path: file.content for path, file in latest.files.items()}

    def commits(self, repo_id: str, repo_type: str = "model") -> list[str]:
        """The titles of the commits made since the repo was created, oldest first."""
        with self.lock:
            return [commit.title for commit in self.repos[repo_type, repo_id].history[1:]]

    def create(self, repo_id: str, repo_type: str = "model", private: bool = False) -> Repo:
        with self.lock:
            repo = self.repos[repo_type, repo_id] = Repo(private)
            repo.commit("initial commit", {})
            return repo

    def web_url(self, repo_type: str, repo_id: str) -> str:
        return f"{self.url}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"

    def put(self, repo_id: str, folder: Path, repo_type: str = "model", private: bool = False) -> None:
        """A new repo (in place of an old one of that name) that holds the files of `folder`."""
        files = {}
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content = path.read_bytes()
            files[path.relative_to(folder).as_posix()] = File(content, _needs_lfs(content[:512], len(content)))
        with self.lock:
            self.create(repo_id, repo_type, private).commit(f"put {repo_id}", files)


class HubError(Exception):
    """An answer that is not a success; `code` is the header by which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict | None = None, **payload):
        super().__init__(message)
        headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self.reply = _json({"error": message, **payload}, status, headers)


def _json(payload: object, status: int = 200, headers: dict | None = None) -> tuple[int, dict, bytes]:
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(payload).encode()


def _needs_lfs(sample: bytes, size: int) -> bool:
    return b"\0" in sample or size > REGULAR_LIMIT


def _byte_range(header: str, size: int) -> tuple[int, int]:
    """First byte and end of `bytes=a-b` or `bytes=a-`, the two forms that the client sends."""
    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", header).groups()
    start, end = int(first), min(int(last) + 1, size) if last else size
    if start >= size:
        raise HubError(416, f"{header} of {size} bytes")
    return start, end


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept: every reply has a length, every body is read
    disable_nagle_algorithm = True  # headers and body are two writes: without this each reply waits 40 ms

    def serve(self):
        self.hub = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.is_owner = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        try:
            with self.hub.lock:
                status, headers, content = self.answer()
        except HubError as error:
            status, headers, content = error.reply
        except Exception:  # the traceback reaches the test through the client's error
            status, headers, content = _json({"error": traceback.format_exc()}, 500)
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = serve  # noqa: N815 (http.server's names)

    def log_message(self, *args):
        pass

    def answer(self) -> tuple[int, dict, bytes]:
        if not self.path.startswith("/"):  # we are asked to be a proxy
            # datasets asks its viewer, at a host name made from HF_ENDPOINT, for a summary that this Hub has not
            if not self.path.startswith(f"http://datasets-server.{self.hub.host}/"):
                self.hub.outside.append(f"{self.command} {self.path}")
            raise HubError(404, f"{self.path} is outside the loopback hub")
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        for methods, pattern, endpoint in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and self.command in methods.split():
                parts = {name: unquote(value or "") for name, value in match.groupdict().items()}
                return endpoint(self, **parts)
        raise HubError(501, f"the loopback hub does not serve {self.command} {self.path}")

    # -- what the endpoints share

    def repo(self, kind: str, repo_id: str, write: bool = False) -> Repo:
        """The repo, if this caller may see it: a private repo and a missing one look the same to a stranger."""
        repo = self.hub.repos.get((kind or "model", repo_id))
        if repo is None or (repo.private and not self.is_owner):
            raise HubError(404 if self.is_owner else 401, f"no {kind or 'model'} {repo_id}", "RepoNotFound")
        if write:
            self.require_owner()
        return repo

    def require_owner(self):
        if not self.is_owner:
            raise HubError(401, "Invalid username or password.")

    def commit_at(self, kind: str, repo_id: str, rev: str) -> Commit:
        history = self.repo(kind, repo_id).history
        for commit in reversed(history):
            if rev in ("", "main", commit.oid):
                return commit
        raise HubError(404, f"no revision {rev} of {repo_id}", "RevisionNotFound")

    # -- the account, and repos as a whole

    def whoami(self):
        self.require_owner()
        return _json({"type": "user", "name": USER, "orgs": []})

    def validate_yaml(self):
        return _json({"errors": [], "warnings": []})

    def create_repo(self):
        self.require_owner()
        asked, kind, repo_id = self.asked_repo()
        url = self.hub.web_url(kind, repo_id)
        if (kind, repo_id) in self.hub.repos:
            raise HubError(409, f"You already created this {kind} repo", url=url)
        self.hub.create(repo_id, kind, private=asked.get("visibility") == "private")
        return _json({"url": url, "name": repo_id})

    def delete_repo(self):
        _, kind, repo_id = self.asked_repo()
        self.repo(kind, repo_id, write=True)
        del self.hub.repos[kind, repo_id]
        return _json({})

    def asked_repo(self) -> tuple[dict, str, str]:
        asked = json.loads(self.body)
        return asked, asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}"

    def repo_info(self, kind, repo, rev):
        commit = self.commit_at(kind, repo, rev)
        siblings = [file.describe(path) for path, file in sorted(commit.files.items())]
        private = self.repo(kind, repo).private
        return _json({"id": repo, "sha": commit.oid, "private": private, "tags": [], "siblings": siblings})

    # -- reading

    def entries(self, files: dict[str, File], folder: str = "") -> dict[str, dict]:
        """Files and folders below `folder`, at any depth, by path."""
        entries = {}
        for path, file in sorted(files.items()):
            for parent in list(PurePosixPath(path).parents)[:-1]:  # the last is the root
                oid = hashlib.sha1(bytes(parent)).hexdigest()
                entries[str(parent)] = {"type": "directory", "path": str(parent), "oid": oid}
            entries[path] = file.describe(path)
        return {path: entry for path, entry in entries.items() if not folder or path.startswith(f"{folder}/")}

    def tree(self, kind, repo, rev, path):
        entries = self.entries(self.commit_at(kind, repo, rev).files, path)
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        if self.query.get("recursive") != "true":
            depth = path.count("/") + 1 if path else 0
            entries = {name: entry for name, entry in entries.items() if name.count("/") == depth}
        return _json(list(entries.values()))

    def paths_info(self, kind, repo, rev):
        entries = self.entries(self.commit_at(kind, repo, rev).files)
        paths = parse_qs(self.body.decode()).get("paths", [])
        return _json([entries[path] for path in paths if path in entries])

    def resolve(self, kind, repo, rev, path):
        commit = self.commit_at(kind, repo, rev)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            # with the commit's name, the client remembers that this commit does not have the file
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound", headers)
        file = commit.files[path]
        headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": len(file.content)}
        if "Range" not in self.headers or self.command == "HEAD":
            return 200, headers, file.content
        start, end = _byte_range(self.headers["Range"], len(file.content))
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(file.content)}"
        return 206, headers, file.content[start:end]

    # -- writing: preupload, then LFS objects, then the commit that names them

    def preupload(self, kind, repo, rev):
        self.repo(kind, repo, write=True)
        files = self.commit_at(kind, repo, rev).files
        modes = []
        for asked in json.loads(self.body)["files"]:
            path, known = asked["path"], files.get(asked["path"])
            mode = "lfs" if _needs_lfs(base64.b64decode(asked["sample"]), asked["size"]) else "regular"
            # the client leaves a file out of the commit when this is the hash of what it has
            oid = known.etag if known else None
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": modes})

    def lfs_batch(self, kind, repo):
        self.repo(kind, repo, write=True)
        objects = json.loads(self.body)["objects"]
        for asked in objects:
            if asked["oid"] not in self.hub.lfs_objects:  # without actions the client sends nothing
                upload = {"href": f"{self.hub.url}/lfs-objects/{asked['oid']}"}
                asked["actions"] = {"upload": upload, "verify": {"href": self.hub.url + "/lfs-verify"}}
        return _json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):  # no token here: on the Hub this is a signed URL of a storage service
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, f"the {len(self.body)} bytes do not have the SHA-256 {oid}")
        self.hub.lfs_objects[oid] = self.body
        return _json({})

    def lfs_verify(self):
        asked = json.loads(self.body)
        if len(self.hub.lfs_objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(400, f"object {asked['oid']} is not here, or has another size")
        return _json({})

    def commit(self, kind, repo, rev):
        target = self.repo(kind, repo, write=True)
        if rev != "main" or self.query.get("create_pr"):
            raise HubError(501, "the loopback hub commits to main only")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        header, parent = header["value"], target.history[-1]
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        commit = target.commit(header["summary"], files)
        return _json({"commitUrl": f"{self.hub.web_url(kind, repo)}/commit/{commit.oid}", "commitOid": commit.oid})

    def apply(self, key: str, value: dict, files: dict[str, File]):
        """One operation of a commit."""
        path = value["path"].rstrip("/")
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.lfs_objects:
                raise HubError(400, f"{path} names an object that was not uploaded")
            files[path] = File(self.hub.lfs_objects[value["oid"]], lfs=True)
        else:
            gone = [path] if key == "deletedFile" else [name for name in files if name.startswith(f"{path}/")]
            if not gone or gone[0] not in files:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]


_REPO = r"(?P<repo>(?:[\w.-]+/)?[\w.-]+)"
_API = rf"/api/(?P<kind>model|dataset|space)s/{_REPO}"
_WEB = rf"/(?:(?P<kind>dataset|space)s/)?{_REPO}"  # a model's address has no prefix
_REV = r"(?P<rev>[^/]+)"  # a slash in a revision is sent as %2F

ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("DELETE", "/api/repos/delete", _Handler.delete_repo),
    ("GET", rf"{_API}/tree/{_REV}(?:/(?P<path>.+))?", _Handler.tree),
    ("POST", rf"{_API}/paths-info/{_REV}", _Handler.paths_info),
    ("POST", rf"{_API}/preupload/{_REV}", _Handler.preupload),
    ("POST", rf"{_API}/commit/{_REV}", _Handler.commit),
    ("GET", rf"{_API}(?:/revision/{_REV})?", _Handler.repo_info),
    ("GET HEAD", rf"{_WEB}/resolve/{_REV}/(?P<path>.+)", _Handler.resolve),
    ("POST", rf"{_WEB}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs-objects/(?P<oid>\w+)", _Handler.lfs_put),
    ("POST", "/lfs-verify", _Handler.lfs_verify),
]
