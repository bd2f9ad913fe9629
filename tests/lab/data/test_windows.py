"""Windows of plain text: no window shares a token with another, and a text that is too short is refused."""

import numpy as np
import pytest
from support import checkpoint, tiny

from rora_theory.errors import InputError
from rora_theory.lab.data.records import FormatConfig
from rora_theory.lab.data.windows import read_texts, sample_windows


def test_windows_do_not_overlap(tmp_path) -> None:
    tokenizer, sizes = tiny.ByteEncoder(), {"windows": 6, "held_out": 3, "seq": 16}
    checkpoint.records(tmp_path / "train.json", 10)
    (tmp_path / "more.txt").write_text("the quick brown fox " * 20)
    texts = read_texts([str(tmp_path / "more.txt"), str(tmp_path / "train.json")])
    assert texts[0].startswith("the quick brown fox")
    assert "### Response:" in texts[1]
    (tmp_path / "own.jsonl").write_text('{"q": "Who?", "a": "I."}\n')
    renamed_fields = FormatConfig(fields={"instruction": "q", "output": "a"})
    assert "Who?" in read_texts([str(tmp_path / "own.jsonl")], renamed_fields)[0]
    windows, held_out = sample_windows(texts, tokenizer, **sizes)
    assert (windows.shape, held_out.shape) == ((6, 16), (3, 16))
    text = ["".join(chr(97 + i % 26) + str(i) for i in range(60))]
    numbered = sample_windows(text, tokenizer, **sizes)
    for seed in (0, 1):  # 0 is the default
        assert np.array_equal(numbered[0], sample_windows(text, tokenizer, **sizes, seed=seed)[0]) == (seed == 0)
    assert len({row.tobytes() for part in numbered for row in part}) == 9
    with pytest.raises(InputError, match=r"at least 9 windows of 16 .* got 3"):
        sample_windows(["x" * 60], tokenizer, **sizes)


def test_a_file_that_is_named_twice_is_refused(tmp_path) -> None:
    """Its windows could be both calibration and held-out windows, also if it is named by another path."""
    text, records = tmp_path / "text.txt", tmp_path / "train.json"
    text.write_text("the quick brown fox " * 20)
    checkpoint.records(records, 10)
    (tmp_path / "link.txt").symlink_to(text)
    assert len(read_texts([str(text), str(records)])) == 11
    for sources in ([text, text], [text, tmp_path / "link.txt"], [text, records, records]):
        with pytest.raises(InputError, match=r"^text .*different"):
            read_texts([str(source) for source in sources])


class EndingEncoder(tiny.ByteEncoder):
    """Encoder that puts the end token after every text."""

    def encode_batch(self, texts):
        return [[*ids, self.eos_id] for ids in super().encode_batch(texts)]


@pytest.mark.parametrize("encoder", [tiny.ByteEncoder, EndingEncoder])
def test_windows_take_all_of_a_text_that_is_just_long_enough(encoder) -> None:
    """Four documents of 6 letters become 8 tokens each, with a token before and the end token after each one."""
    texts, sizes = ["abcdef", "ghijkl", "mnopqr", "stuvwx"], {"seq": 16, "windows": 1, "held_out": 1}
    splits = sample_windows(texts, encoder(), **sizes)
    windows = sorted(row.tolist() for split in splits for row in split)
    assert windows == [[1, *b"abcdef", 2, 1, *b"ghijkl", 2], [1, *b"mnopqr", 2, 1, *b"stuvwx", 2]]
    orders = {tuple(sample_windows(texts, tiny.ByteEncoder(), **sizes, seed=seed)[0][0].tolist()) for seed in range(8)}
    assert len(orders) == 2, "either window is held out at some seed"


def test_a_text_whose_windows_are_all_held_out_is_too_short() -> None:
    with pytest.raises(InputError, match=r"at least 3 windows of 4 .* got 2"):
        sample_windows(["abcdefg"], tiny.ByteEncoder(), seq=4, windows=None, held_out=2)
