"""The how-to page's example runs as printed, on a tiny model instead of the one that it names."""

import re
from pathlib import Path

import pytest
from support import torch_chats, torch_models
from support.torch_models import torch, transformers

pytest.importorskip("accelerate", reason="transformers' trainer: accelerate")
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "measure-my-model.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers and peft
def test_the_page(tmp_path, monkeypatch, capsys) -> None:
    def load(name, dtype="auto", device_map=None):
        """Load a bfloat16 checkpoint: since transformers 5 a model keeps the dtype of its file by default."""
        assert (name, device_map) in (("Qwen/Qwen2.5-0.5B", "auto"), ("Qwen/Qwen2.5-0.5B", None))
        return torch_models.model("qwen2").to(torch.bfloat16 if dtype == "auto" else dtype)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: torch_chats.tokenizer("~"))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names = {"texts": [f"{chr(97 + i)} record of some {'words ' * (1 + i % 3)}" for i in range(16)]}
    for block in blocks[:3]:
        exec(block, names)
    printed = capsys.readouterr().out
    assert "From rank 16 to 128 with AdamW" in printed
    assert "The first steps of the whole model" in printed
    assert " in float32 " in names["check"].scope
    assert f"AdamW at {names['tuned'].learning_rate:g}," in names["check"].scope
    assert names["config"].r == 128
    assert names["measured"].left_out == {}
    args = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    rows = [{name: value[i] for name, value in names["batch"].items()} for i in range(8)]
    names["trainer"] = transformers.Trainer(names["make_model"](2), args, train_dataset=rows)
    exec(blocks[3], names)
    names["trainer"].train()
    assert "regime/crossing_rank" in names["trainer"].state.log_history[0]
