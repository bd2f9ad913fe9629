"""Which tokens of a batch modules are read at, whatever the order of their inputs."""

import numpy as np
import pytest

from rora_theory.measure.regimes.module_regime import RegimeConfig

torch = pytest.importorskip("torch", reason="the bridge: the extra torch")
transformers = pytest.importorskip("transformers", reason="the bridge: the extra torch")

from support import torch_models  # noqa: E402

from rora_theory.measure.torch import regime  # noqa: E402
from rora_theory.measure.torch import regimes as torch_regimes  # noqa: E402
from rora_theory.measure.torch.batches import find_masks, select_masks  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
PADDING = 0


class Sequential(torch.nn.Module):
    """A linear module whose input, the token ids themselves, is [sequence, batch] or [batch, sequence]."""

    def __init__(self, *, sequence_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sequence_first = sequence_first
        self.linear = torch.nn.Linear(2, 3)

    def forward(self, input_ids, attention_mask):
        x = torch.stack([input_ids.float(), torch.ones_like(input_ids, dtype=torch.float32)], dim=-1)
        y = self.linear(x.transpose(0, 1) if self.sequence_first else x)
        y = y.transpose(0, 1) if self.sequence_first else y
        return (y * attention_mask[..., None]).square().mean()


def padded(*lengths: int, first: int = 1) -> dict[str, torch.Tensor]:
    """Rows of these lengths, padded on the right, no token of which is there twice."""
    mask = (torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]).long()
    ids = first + torch.arange(mask.numel()).reshape(mask.shape)
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("lengths", [(5, 2, 4), (4, 2, 3, 1)], ids=["oblong", "square"])
@pytest.mark.parametrize("sequence_first", [False, True])
def test_padding_is_not_read_in_either_order(sequence_first, lengths, monkeypatch) -> None:
    """A square input may be of either order, so only tokens that are real in both are read."""
    model, read = Sequential(sequence_first=sequence_first), []
    add = torch_regimes._InputSampler.add

    def record_sample(self, name, x) -> None:
        add(self, name, x)
        read.append(self.inputs[name][:, 0])

    monkeypatch.setattr(torch_regimes._InputSampler, "add", record_sample)
    found = regime(
        model,
        padded(*lengths),
        padded(*lengths, first=40),
        loss=lambda model, batch: model(**batch),
        config=RegimeConfig(ranks=(1,), inits=("gaussian",), rows=0, tokens=50),
    )
    assert found.unmasked == ()
    mask = padded(*lengths)["attention_mask"]
    both = mask & mask.T if mask.shape[0] == mask.shape[1] else mask
    assert {len(ids) for ids in read} == {int(both.sum())}
    assert not np.isin(PADDING, np.concatenate(read))


def t5_batch(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Encoder's and decoder's tokens, padded."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row[i]) for row in rows], True, padding_value=value)
        for i, value in enumerate((PADDING, -100))
    )
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": labels}


def test_tokens_of_a_decoder() -> None:
    """Seen where the encoder read the same record and the labels began as the trained ones did."""
    model = torch_models.model("t5")
    trained = t5_batch([([5, 6, 7], [11, 12, 13, 14, 15]), ([8, 9], [11, 12, 13])])
    held_out = t5_batch([([5, 6, 7], [11, 12, 20, 21]), ([8, 8], [11, 12, 13]), ([8, 9], [11, 12, 13, 30, 31])])
    known = select_masks(find_masks(model, held_out, trained), torch.zeros(3, 5, 4))
    assert known is not None
    assert known.real.reshape(3, 5).sum(1).tolist() == [4, 3, 5]
    # The input at a position is the label before it: three positions see no new label, and none of another record.
    assert (known.seen & known.real).reshape(3, 5).astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
    ]


def test_an_encoder_and_a_decoder_of_one_length() -> None:
    """No padding of either is read, though their inputs have one shape."""
    model = torch_models.model("t5")
    batch = t5_batch([([5, 6, 7, 8], [11, 12]), ([9, 10], [13, 14, 15, 16])])
    real = select_masks(find_masks(model, batch), torch.zeros(2, 4, 4)).real.reshape(2, 4)
    assert real.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_decoder_inputs_that_are_given() -> None:
    model = torch_models.model("t5")
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "decoder_input_ids": torch.tensor([[0, 11, 12, 13]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 0]]),
    }
    assert select_masks(find_masks(model, batch), torch.zeros(1, 4, 2)).real.tolist() == [True, True, True, False]


@pytest.mark.parametrize("rows", [3, 8], ids=["oblong", "square"])
def test_longformer(rows) -> None:
    """Its attention receives [sequence, batch]: the counts are those of its other modules, padding left out."""
    config = transformers.LongformerConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        attention_window=4, max_position_embeddings=64, pad_token_id=0, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = torch_models.initialised(transformers.LongformerForTokenClassification(config)).eval()
    batches = []
    for seed in (0, 1):
        batch = torch_models.batch(seed=seed, rows=rows, length=8)
        mask = torch.ones_like(batch["input_ids"])
        mask[0, 4:] = 0
        labels = (batch["input_ids"] % 2).masked_fill(mask == 0, -100)
        batches.append({"input_ids": batch["input_ids"] * mask, "attention_mask": mask, "labels": labels})
    small = RegimeConfig(ranks=(1,), inits=("gaussian",), rows=0, tokens=200)
    found = regime(model, *batches, ["query", "dense"], config=small)
    read = found.tokens.query("split == 'train'")["read"]
    assert found.unmasked == ()
    assert set(read) == {8 * rows - 4 if rows == 3 else 8 * rows - 8}
