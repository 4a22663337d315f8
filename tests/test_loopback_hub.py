"""The loopback Hub, seen by the real clients: each `..._client` function runs in a process of its own."""

import json

from .loopback_hub import LoopbackHub


def upload_client():
    from pathlib import Path

    from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download

    def contents(folder):
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    api, folder = HfApi(), Path("folder")
    assert api.whoami()["name"] == "loopback"
    assert api.create_repo("org/upload").repo_id == "org/upload"

    expected = contents(folder)
    first = api.upload_folder(repo_id="org/upload", folder_path=folder, commit_message="first")
    again = api.upload_folder(repo_id="org/upload", folder_path=folder, commit_message="nothing new")
    assert first.oid == again.oid

    info = api.model_info("org/upload", files_metadata=True)
    assert info.sha == first.oid
    assert {file.rfilename: file.size for file in info.siblings} == {name: len(expected[name]) for name in expected}
    assert [file.rfilename for file in info.siblings if file.lfs] == ["model.safetensors"]
    assert sorted(api.list_repo_files("org/upload")) == sorted(expected)
    assert {entry.path for entry in api.list_repo_tree("org/upload")} == {name.split("/")[0] for name in expected}
    assert [entry.path for entry in api.list_repo_tree("org/upload", "sub")] == ["sub/with space.json"]
    assert [entry.path for entry in api.get_paths_info("org/upload", ["sub", "empty.txt", "no"])] == [
        "sub",
        "empty.txt",
    ]

    snapshot = Path(snapshot_download("org/upload"))
    assert snapshot.name == first.oid
    assert contents(snapshot) == expected
    for name, content in expected.items():
        assert Path(hf_hub_download("org/upload", name, force_download=True)).read_bytes() == content
    with HfFileSystem().open("org/upload/model.safetensors", block_size=100) as file:
        file.seek(1000)
        assert file.read(10) == expected["model.safetensors"][1000:1010]


def test_upload_is_one_commit_and_comes_back_equal(loopback_hub, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Title\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "sub" / "with space.json").write_text("{}")
    (folder / "empty.txt").touch()
    loopback_hub.run(upload_client, tmp_path)
    assert loopback_hub.commits("org/upload") == ["first"]
    files = loopback_hub.files("org/upload")
    assert sorted(files) == ["README.md", "empty.txt", "model.safetensors", "sub/with space.json"]
    assert files["model.safetensors"] == bytes(range(256)) * 100


def change_client():
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    import pytest
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    start = api.model_info("org/change").sha

    def upload(name):
        api.upload_file(repo_id="org/change", path_in_repo=name, path_or_fileobj=b"\0" + name.encode())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(upload, [f"{index}.bin" for index in range(8)]))
    api.delete_folder("old", "org/change")
    api.delete_file("0.bin", "org/change")

    assert Path(hf_hub_download("org/change", "7.bin")).read_bytes() == b"\x007.bin"
    assert Path(hf_hub_download("org/change", "old/a.txt", revision=start)).read_text() == "a"
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("org/change", "old/a.txt")
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("old/a.txt", "org/change")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/change", "7.bin", revision="v1")
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(repo_id="org/change", path_in_repo="x", path_or_fileobj=b"late", parent_commit=start)

    api.create_repo("org/gone", private=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("org/gone")
    assert api.create_repo("org/gone", exist_ok=True).repo_id == "org/gone"
    assert api.model_info("org/gone").private
    api.delete_repo("org/gone")
    assert not api.repo_exists("org/gone")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("org/gone")


def test_commits_follow_each_other(loopback_hub, tmp_path):
    folder = tmp_path / "seed"
    (folder / "old").mkdir(parents=True)
    (folder / "old" / "a.txt").write_text("a")
    (folder / "old" / "b.txt").write_text("b")
    loopback_hub.put("org/change", folder)
    loopback_hub.run(change_client, tmp_path)
    assert sorted(loopback_hub.files("org/change")) == [f"{index}.bin" for index in range(1, 8)]
    assert len(loopback_hub.commits("org/change")) == 1 + 8 + 2


def transformers_client():
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    model.push_to_hub("org/bert")
    loaded = AutoModelForSequenceClassification.from_pretrained("org/bert").eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_transformers_push_and_load(loopback_hub, tmp_path):
    loopback_hub.run(transformers_client, tmp_path)
    assert sorted(loopback_hub.files("org/bert")) == ["README.md", "config.json", "model.safetensors"]
    assert loopback_hub.commits("org/bert") == ["Upload BertForSequenceClassification"]


def datasets_client():
    from datasets import load_dataset

    validation = load_dataset("org/rows", split="validation")
    assert validation[:] == {"text": ["row 0", "row 1"], "label": [0, 1]}
    assert next(iter(load_dataset("org/rows", split="train", streaming=True)))["text"] == "row 0"
    validation.push_to_hub("org/pushed", private=True)
    assert load_dataset("org/pushed", split="validation")[:] == validation[:]


def test_datasets_load_and_push_by_repo_id(loopback_hub, tmp_path):
    folder = tmp_path / "seed"
    folder.mkdir()
    for split, num_rows in {"train": 4, "validation": 2}.items():
        rows = [json.dumps({"text": f"row {index}", "label": index}) + "\n" for index in range(num_rows)]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    loopback_hub.put("org/rows", folder, repo_type="dataset")
    loopback_hub.run(datasets_client, tmp_path)
    assert "data/validation-00000-of-00001.parquet" in loopback_hub.files("org/pushed", "dataset")


def stranger_client():
    import pytest
    from huggingface_hub import HfApi, get_session, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    api = HfApi()
    assert api.list_repo_files("org/public") == ["a.txt"]
    for read in (api.model_info, snapshot_download, lambda repo_id: hf_hub_download(repo_id, "a.txt")):
        for repo_id in ("org/private", "org/missing"):  # nothing tells the one from the other
            with pytest.raises(RepositoryNotFoundError, match="401"):
                read(repo_id)
    with pytest.raises(HfHubHTTPError, match="401"):
        api.upload_file(repo_id="org/public", path_in_repo="a.txt", path_or_fileobj=b"mine")
    with pytest.raises(HfHubHTTPError, match="401"):
        api.create_repo("org/new")
    with pytest.raises(Exception, match="404"):
        get_session().get("https://elsewhere.example/").raise_for_status()


def test_stranger_reads_what_is_public_and_nothing_leaves_the_loopback(tmp_path):
    folder = tmp_path / "seed"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    with LoopbackHub() as hub:
        hub.put("org/public", folder)
        hub.put("org/private", folder, private=True)
        hub.run(stranger_client, tmp_path, token=None)
        assert hub.files("org/public") == {"a.txt": b"a"}
        assert hub.outside == ["CONNECT elsewhere.example:443"]
