"""Sources: splits of folders and of the hub, and the files of the tasks."""

import pytest
from support.hub import serving
from support.record_files import write

from rora_theory.errors import InputError
from rora_theory.lab.data import hub_files
from rora_theory.lab.data.formats import Text
from rora_theory.lab.data.hub_files import Split
from rora_theory.lab.data.records import DataConfig, read_records
from rora_theory.lab.data.sources import locate_task
from rora_theory.lab.data.tasks import TASKS

CARD = b"""---
configs:
- config_name: english
  default: true
  data_files:
  - split: train
    path: en/*.jsonl
  - {split: test, path: [en-test/part.jsonl]}
- config_name: german
  data_dir: de
  data_files: '**/*.jsonl'
---
About it.
"""
FILES = ["README.md", "en/a.jsonl", "en/b.jsonl", "en/deep/c.jsonl", "en-test/part.jsonl", "de/x/a.jsonl"]


def test_the_card_determines_the_files_of_a_split(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(CARD if name == "README.md" else b'{"text": "a"}')

    def files(subset, split):
        located = hub_files.locate_split(Split(str(tmp_path), subset, split))
        return [path.relative_to(tmp_path).as_posix() for path in located]

    assert files(None, "train") == files("english", "train") == ["en/a.jsonl", "en/b.jsonl"]
    assert files(None, "test") == ["en-test/part.jsonl"]
    assert files("german", "train") == ["de/x/a.jsonl"]
    with pytest.raises(InputError, match=rf"{tmp_path}: no split 'dev'.* train, test"):
        files(None, "dev")
    with pytest.raises(InputError, match=r"'french' .*'english', 'german'"):
        files("french", "train")


def test_a_split_of_a_folder(tmp_path):
    (tmp_path / "en").mkdir()
    for name, rows in (("train-1", [{"text": "1"}]), ("train-2", [{"text": "2"}]), ("test", [{"text": 3}])):
        write(tmp_path / "en" / f"{name}.jsonl", rows)
    assert read_records([f"{tmp_path}/en:train"]) == [Text("1"), Text("2")]
    with pytest.raises(InputError, match=r"en/test\.jsonl: record 1: 'text' .* a number"):
        read_records([f"{tmp_path}/en:test"])


def test_the_names_of_splits(tmp_path):
    (tmp_path / "a:train").touch()
    names = ("hf://datasets/them/set/x.jsonl", "hf://datasets/them:train", "nowhere/at/all:train", tmp_path / "a:train")
    assert [hub_files.parse_split(str(name)) for name in names] == [None] * 4
    assert hub_files.parse_split(f"{tmp_path}/none:train") == Split(str(tmp_path), "none", "train")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Start a server of three data sets in place of the hub, with an empty cache."""
    import datasets
    import huggingface_hub.constants as constants

    line = b'{"text": "a"}'
    repositories = {
        "datasets/them/set": {
            "main": {name: CARD if name == "README.md" else line for name in FILES},
            "v1": {"train.jsonl": b"\n".join([line] * 3)},
        },
        "datasets/them/tables": {"main": {"train.csv": b"text\nx\n"}},
        "datasets/them/tasks": {"main": {"piqa/test.json": b"1"}, "v1": {"data/eval/piqa/test.json": b"2"}},
    }
    with serving(repositories) as server:
        endpoint = server.environment["HF_ENDPOINT"]
        values = {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def test_splits_and_files_of_the_hub(hub, monkeypatch):
    def count(name):
        return len(read_records([f"hf://datasets/them/{name}"]))

    assert count("set:train") == 2
    assert not [path for path in hub.asked if "de/" in path]
    names = ("set/german:train", "set@v1:train", "set/en/a.jsonl", "set@v1/train.jsonl")
    assert [count(name) for name in names] == [1, 3, 1, 3]
    assert read_records(["hf://datasets/them/tables:train"]) == [Text("x")]
    for name, message in (
        ("none:train", r"hf://datasets/them/none: the data set cannot be read \(.*\)"),
        ("set/en/none.jsonl", r"^hf://datasets/them/set/en/none\.jsonl: cannot be downloaded \(.*\)"),
        ("set", "them/set: not the name of a file or split"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            count(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"a\.jsonl: record 1 has no 'instruction'; its keys are 'text'"):
        read_records(["hf://datasets/them/set:train"], DataConfig(format="alpaca"))
    # Without the server, files in the cache are read and others are refused. (Offline, nothing is tried again.)
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert count("set@v1:train") == 3
    with pytest.raises(InputError, match="more: the data set cannot be read"):
        count("more:train")


@pytest.mark.usefixtures("hub")
def test_a_task_s_file_in_a_folder_or_on_the_hub(tmp_path):
    (tmp_path / "piqa").mkdir()
    path = tmp_path / "piqa" / "test.json"
    path.write_text("[]")
    assert locate_task(tmp_path, TASKS["piqa"]) == path
    for data, content in (("tasks", "1"), ("tasks@v1/data/eval", "2")):
        assert locate_task(f"hf://datasets/them/{data}", TASKS["piqa"]).read_text() == content
    for data, message in (
        (tmp_path, r"boolq/test\.json: no such file.* a folder"),
        ("hf://datasets/them/tasks", r"boolq/test\.json: cannot be downloaded \(.*\)"),
        ("hf://datasets/", r"hf://datasets/boolq/test\.json: not the name of a file"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            locate_task(data, TASKS["boolq"])
        assert "\n" not in str(caught.value)
