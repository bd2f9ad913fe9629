"""Where a task's file is looked for."""

from pathlib import Path

import huggingface_hub
import pytest

from rora_theory.data.sources import locate_task
from rora_theory.data.tasks import TASKS
from rora_theory.errors import InputError


def test_a_folder_holds_one_folder_a_task(tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "test.json").write_text("[]")
    assert locate_task(tmp_path, TASKS["piqa"]) == tmp_path / "piqa" / "test.json"
    with pytest.raises(InputError, match=r"boolq/test\.json: no such file.* a folder"):
        locate_task(tmp_path, TASKS["boolq"])


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf://datasets/owner/name", ("owner/name", "ARC-Easy/test.json", None)),
        ("hf://datasets/owner/name@v1/data/eval", ("owner/name", "data/eval/ARC-Easy/test.json", "v1")),
    ],
)
def test_a_hub_dataset_of_the_same_layout(
    name: str, asked: tuple[str, str, str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def download(repository: str, file: str, *, repo_type: str, revision: str | None) -> str:
        assert repo_type == "dataset"
        calls.append((repository, file, revision))
        return str(tmp_path / "found")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert locate_task(name, TASKS["ARC-Easy"]) == tmp_path / "found"
    assert calls == [asked]


def test_what_the_hub_lacks_or_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InputError, match=r"piqa/test\.json: cannot be downloaded \(no connection\)"):
        locate_task("hf://datasets/owner/name", TASKS["piqa"])
    with pytest.raises(InputError, match="owner: not the name of a data set"):
        locate_task("hf://datasets/owner", TASKS["piqa"])
