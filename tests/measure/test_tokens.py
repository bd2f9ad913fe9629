"""Tokens of a batch at which modules are read, for any order of their inputs."""

import pytest
from support import torch_models
from support.torch_models import padded, torch, transformers

from rora_theory.measure import regime
from rora_theory.measure.batches import find_masks, select_masks
from rora_theory.measure.modules import task_type
from rora_theory.measure.regimes import model as torch_regimes
from rora_theory.measure.regimes.module_regime import RegimeConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers
PADDING = 0


class Sequential(torch.nn.Module):
    """Linear modules on the token ids themselves, as [sequence, batch] or [batch, sequence].

    ``linear`` runs twice. ``flat`` receives the tokens of all rows as one list.
    """

    def __init__(self, order: tuple[str, ...], *, sequence_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order, self.sequence_first = order, sequence_first
        self.linear, self.flat = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)

    def forward(self, input_ids, attention_mask, **_):
        x = torch.stack([input_ids.float(), torch.ones_like(input_ids, dtype=torch.float32)], dim=-1)
        mask = attention_mask[..., None]
        x, mask = (value.transpose(0, 1) if self.sequence_first else value for value in (x, mask))
        y = torch.zeros(())
        for name in self.order:
            if name == "flat":
                y = y + self.flat(x.reshape(-1, 2)).reshape(*x.shape[:-1], 3)
            else:
                y = y + self.linear(x) + torch.tanh(self.linear(x))
        return (y * mask).square().mean()


def distinct_rows(lengths: tuple[int, ...], first: int) -> dict[str, torch.Tensor]:
    """Return padded rows of these lengths, in which no token occurs twice."""
    return padded([list(range(first + 10 * i, first + 10 * i + length)) for i, length in enumerate(lengths)])


@pytest.mark.parametrize("lengths", [(5, 2, 4), (4, 2, 3, 1)], ids=["oblong", "square"])
@pytest.mark.parametrize("order", [("linear",), ("flat", "linear"), ("linear", "flat")])
@pytest.mark.parametrize("sequence_first", [False, True])
def test_padding_and_seen_tokens_are_skipped_in_any_call_and_order(sequence_first, order, lengths, monkeypatch) -> None:
    """A square input may have either order, so only tokens that are real and new in both orders are read.

    In a list of tokens rows come first, as in most models. Once an input of shape [sequence, batch] shows that they may
    not, only tokens that are real, and new, in both orders are read; a module that was read before is reported.
    """
    samples = {}
    measure = torch_regimes.module_regime.measure_module

    def watched(config, layer, *rest):
        samples[layer.name] = layer.inputs
        return measure(config, layer, *rest)

    monkeypatch.setattr(torch_regimes.module_regime, "measure_module", watched)
    config = RegimeConfig(ranks=(1,), inits=("gaussian",), rows=0, tokens=50)
    train, held_out = (distinct_rows(lengths, first) for first in (1, 51))
    held_out["input_ids"][0, :2] = train["input_ids"][0, :2]
    model = Sequential(order, sequence_first=sequence_first)
    measured = regime(model, train, held_out, loss=lambda model, batch: model(**batch), config=config)
    real = train["attention_mask"].bool()
    is_square = len(set(real.shape)) == 1
    assert measured.unmasked == (("flat",) if sequence_first and order[0] == "flat" and not is_square else ())
    seen = torch.zeros_like(real)
    seen[0, :2] = True
    if is_square:
        real, seen = real & real.T, seen | seen.T
    for split, ids in (("train", train["input_ids"][real]), ("heldout", held_out["input_ids"][real & ~seen])):
        assert sorted(samples["linear"][split][:, 0].tolist()) == sorted(ids.tolist() * 2)
    if "flat" in order and not measured.unmasked:
        read = set(samples["flat"]["heldout"][:, 0].tolist())
        assert not read & {*train["input_ids"].flatten().tolist(), PADDING}
        assert PADDING not in samples["flat"]["train"][:, 0]
        if not sequence_first and not is_square:
            assert read == set(held_out["input_ids"][real & ~seen].tolist())


def test_sinks_are_left_out_of_the_held_out_tokens_alone() -> None:
    """A training token with an outlying input contributes to the gradient like every other."""
    torch.manual_seed(0)
    x = torch.randn(9, 6)
    x[0] *= 1000
    config = RegimeConfig(ranks=(1,), inits=("gaussian",), rows=0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    measured = regime(model, {"x": x}, {"x": x}, loss=lambda model, batch: model(batch["x"]).mean(), config=config)
    assert measured.tokens.set_index("split")["sinks"].to_dict() == {"train": 0, "heldout": 1}


def t5_batch(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Return padded tokens of the encoder and the decoder."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(row[i]) for row in rows], True, padding_value=value)
        for i, value in enumerate((PADDING, -100))
    )
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": labels}


def test_tokens_of_a_decoder() -> None:
    """They count as seen if the encoder read the same record and the labels begin as trained ones."""
    model = torch_models.model("t5")
    trained = t5_batch([([5, 6, 7], [11, 12, 13, 14, 15]), ([8, 9], [11, 12, 13])])
    held_out = t5_batch([([5, 6, 7], [11, 12, 20, 21]), ([8, 8], [11, 12, 13]), ([8, 9], [11, 12, 13, 30, 31])])
    masks = select_masks(find_masks(model, held_out, trained), torch.zeros(3, 5, 4))
    assert masks is not None
    assert masks.real.reshape(3, 5).sum(1).tolist() == [4, 3, 5]
    # The input at a position is the label before it: three positions see no new label, and none of another record.
    assert (masks.seen & masks.real).reshape(3, 5).astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
    ]


def test_encoder_and_decoder_tokens_of_one_size_are_ambiguous() -> None:
    """Only a token that counts in both is read; it counts as seen if either was."""
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]),
        "labels": torch.tensor([[5, -100, 6, -100, -100, 7]]),
    }
    trained = {"input_ids": batch["input_ids"][:, :2]}
    masks = find_masks(torch_models.model("t5"), batch, trained)[(1, 6)]
    assert masks.real.tolist() == [True, False, True, False, False, False]
    assert masks.seen.tolist() == [True, True, False, False, False, False]


def test_explicit_decoder_inputs() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "decoder_input_ids": torch.tensor([[0, 11, 12, 13]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 0]]),
    }
    masks = select_masks(find_masks(torch_models.model("t5"), batch), torch.zeros(1, 4, 2))
    assert masks.real.tolist() == [True, True, True, False]


def test_packed_records_with_several_positions() -> None:
    """Models of images give each token a position in time, height and width; all are 0 where a record begins."""
    ids = torch.tensor([[5, 6, 7, 5, 8]])
    positions = torch.tensor([[[0, 1, 1, 0, 1]], [[0, 0, 1, 0, 1]], [[0, 1, 0, 0, 1]]])
    batch, trained = {"input_ids": ids, "position_ids": positions}, {"input_ids": torch.tensor([[5, 6]])}
    masks = select_masks(find_masks(torch_models.model(), batch, trained), torch.zeros(1, 5, 2))
    assert masks.seen.tolist() == [True, True, False, True, False]


def test_a_model_of_images_and_text_is_causal() -> None:
    """Its class is named like that of a model with an encoder, which has another task."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**torch_models.TEXT),
    )
    assert task_type(transformers.LlavaForConditionalGeneration(config)) == "CAUSAL_LM"
    assert task_type(torch_models.model("t5")) == "SEQ_2_SEQ_LM"


def test_a_record_without_a_target_has_no_token_that_counts() -> None:
    """In a causal model a token counts if a later one is a target, which it helps to predict."""
    labels = torch.full((2, 6), -100)
    labels[1, 3] = 1
    masks = find_masks(torch_models.model(), {"input_ids": torch.arange(12).reshape(2, 6), "labels": labels})
    assert masks[2, 6].real.reshape(2, 6).sum(axis=1).tolist() == [0, 3]


@pytest.mark.parametrize("rows", [3, 8], ids=["oblong", "square"])
def test_longformer(rows) -> None:
    """Its attention receives [sequence, batch]; the counts equal those of its other modules, without padding."""
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
    measured = regime(model, *batches, ["query", "dense"], config=small)
    read = measured.tokens.query("split == 'train'")["read"]
    assert measured.unmasked == ()
    assert set(read) == {8 * rows - 4 if rows == 3 else 8 * rows - 8}
