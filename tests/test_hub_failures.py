"""The Hub fails half-way: a push is whole or not there, and the next one succeeds; so it is with a download."""

import hashlib
import json
import re
import shutil
import socket
from collections import Counter

import pytest

from .loopback_hub import HubError, LoopbackHub, _Handler
from .test_publishing import local_files, save_mood


GIVES_UP = 6  # requests: the client tries most of them again five times
CUT = "cut"  # the connection, when half of the content is through
FAULTS = {  # by the name of the repo: which request fails, how, and how many times
    "no-preupload": ("POST", "/preupload/", 500, GIVES_UP),
    "no-batch": ("POST", "/objects/batch", 500, GIVES_UP),
    "no-upload": ("PUT", "/lfs-objects/", 500, GIVES_UP),
    "cut-uploads": ("PUT", "/lfs-objects/", CUT, GIVES_UP),
    "no-commit": ("POST", "/commit/", 503, 1),
    "one-bad-upload": ("PUT", "/lfs-objects/", 500, 1),
    "one-cut-upload": ("PUT", "/lfs-objects/", CUT, 1),
    "no-download": ("GET", "/model.safetensors", 500, 1),
    "cut-download": ("GET", "/model.safetensors", CUT, 1),
}
REFUSED = {
    "no-preupload": "HfHubHTTPError: Server error '500",
    "no-batch": "HfHubHTTPError: Server error '500",
    "no-upload": "RuntimeError: Error while uploading 'onnx/model.onnx'",
    "cut-uploads": "RuntimeError: Error while uploading 'onnx/model.onnx'",
    "no-commit": "HfHubHTTPError: Server error '503",
    "no-download": "OSError: ",
}
PUSHED = [name for name in FAULTS if not name.endswith("download")]


def large_file(name):
    """What only the repo of that name holds."""
    return b"\0" + 50_000 * name.encode()


class Failing(_Handler):
    """A Hub on which the requests of `FAULTS` fail, as often as they are to."""

    def do_any(self):
        hub = self.server.hub
        for name, (method, piece, how, times) in FAULTS.items():
            own = f"/lfs-objects/{hashlib.sha256(large_file(name)).hexdigest()}"
            here = re.search(rf"org/{name}(\.git)?/", self.path) or self.path == own
            if here and self.command == method and piece in self.path:
                hub.failed[name] += 1
                if hub.failed[name] <= times:
                    return self.cut(name) if how == CUT else self.refuse(how)
        return self.serve()

    do_GET = do_POST = do_PUT = do_any  # noqa: N815 (http.server's names)

    def refuse(self, status):
        def answer():
            raise HubError(status, "out of order", headers={"Retry-After": "0"})

        self.answer = answer
        self.serve()
        del self.answer  # the connection is kept for further requests

    def cut(self, name):
        if self.command == "GET":
            content = self.server.hub.files(f"org/{name}")["model.safetensors"]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def failing_client():
    import json
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    import torch

    from hf_calib import load_calibrated
    from hf_calib.publishing import push_folder

    def download(name):
        return str(load_calibrated(f"org/{name}")(input_ids=torch.tensor([[1, 2, 3]])).logits.tolist())

    def push(name):
        return push_folder(Path(name), f"org/{name}").commit_url

    def twice(name):
        found = []
        for _ in range(2):
            try:
                found.append((download if name.endswith("download") else push)(name))
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
        return found

    names = json.loads(Path("names.json").read_text())
    with ThreadPoolExecutor(len(names)) as pool:
        print(json.dumps(dict(zip(names, pool.map(twice, names), strict=True))))


def private_client():
    from hf_calib import AutoCalibrator, load_calibrated

    for token in (None, "hf_loopback"):  # in this order: what is in the cache needs no token
        for load in (load_calibrated, AutoCalibrator.from_pretrained):
            try:
                print(type(load("org/private", token=token)).__name__)
            except FileNotFoundError as error:
                print(error)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("failures")
    save_mood(place / "made")
    for name in FAULTS:
        shutil.copytree(place / "made", place / name)
        if name in PUSHED:
            (place / name / "onnx").mkdir()
            (place / name / "onnx" / "model.onnx").write_bytes(large_file(name))
    (place / "names.json").write_text(json.dumps(list(FAULTS)))
    return place


@pytest.fixture(scope="module")
def hub(place):
    """A Hub with which each repo was pushed to, or loaded from, twice."""
    with LoopbackHub() as hub:
        hub.failed, hub.server.RequestHandlerClass = Counter(), Failing
        for name in FAULTS.keys() - PUSHED:
            hub.put(f"org/{name}", place / name)
        hub.results = json.loads(hub.run(failing_client, place))
        yield hub
    assert hub.outside == []


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_has_happened_as_often_as_it_was_to(name, hub):
    assert hub.failed[name] >= FAULTS[name][-1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_fails_for_good_says_so(name, hub):
    assert hub.results[name][0].startswith(REFUSED[name])


@pytest.mark.parametrize("name", PUSHED)
def test_there_is_one_commit_with_all_files_however_often_it_was_tried(name, hub, place):
    attempts = hub.results[name][name in REFUSED :]
    assert all(url.startswith(f"{hub.url}/org/{name}/commit/") for url in attempts)
    assert hub.commits(f"org/{name}") == ["Upload calibrated model"]
    pushed, local = hub.files(f"org/{name}"), local_files(place / name)
    assert set(pushed) == set(local)
    assert [key for key in local if pushed[key] != local[key]] == ["README.md"]  # which has the repo's name


def test_a_download_goes_on_or_is_asked_for_again(hub):
    first, second = hub.results["cut-download"]
    assert first == second == hub.results["no-download"][1]


def test_a_private_repo_is_there_for_those_with_the_token(hub, place):
    hub.put("org/private", place / "made", private=True)
    *lines, _ = hub.run(private_client, place, token=None).split("\n")
    unknown = "org/private: neither a folder nor a Hub repo that this token can read"
    assert lines == [unknown, unknown, "BertForSequenceClassification", "IsotonicCalibration"]
