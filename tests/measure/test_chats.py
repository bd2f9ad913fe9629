"""The collator of chats: labels are the assistant's tokens and end tokens, with or without a padding token."""

import pytest
from support import torch_chats
from support.torch_models import torch

from rora_theory import InputError
from rora_theory.measure import ChatCollator

CHATS = [
    {
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "user", "content": "a words"},
            {"role": "assistant", "content": "do"},
            {"role": "user", "content": "do"},
            {"role": "assistant", "content": "dodo"},
        ]
    },
    {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "go"}]},
]


def learned(tokenizer, batch) -> list[list[str]]:
    """Return the tokens with a label row by row, after checking that each is its own label."""
    is_label = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_label], batch["input_ids"][is_label])
    assert bool(batch["attention_mask"][is_label].all())
    return [tokenizer.convert_ids_to_tokens(row[row != -100].tolist()) for row in batch["labels"]]


@pytest.mark.parametrize("pad", ["</s>", "~", None])
def test_the_assistant_s_tokens_and_its_end_token(pad) -> None:
    """For any padding token, no prompt, template mark or line break after the end token has a label."""
    tokenizer = torch_chats.tokenizer(pad)
    batch = ChatCollator(tokenizer)(CHATS)
    assert learned(tokenizer, batch) == [["d", "o", "</s>", "d", "o", "d", "o", "</s>"], ["x", "o", "</s>"]]
    for row, chat in enumerate(CHATS):
        text = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == ids
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (len(real) - len(ids))


def test_a_turn_of_weight_0() -> None:
    """The model reads the turn but is not trained on it."""
    first, last = CHATS[0]["messages"][2], CHATS[0]["messages"][4]
    messages = [*CHATS[0]["messages"][:2], first | {"weight": 0}, CHATS[0]["messages"][3], last | {"weight": 1}]
    tokenizer = torch_chats.tokenizer(None)
    batch = ChatCollator(tokenizer)([{"messages": messages}])
    assert learned(tokenizer, batch) == [["d", "o", "d", "o", "</s>"]]
    assert torch.equal(batch["input_ids"], ChatCollator(tokenizer)(CHATS[:1])["input_ids"])


def test_a_maximum_length() -> None:
    """The beginning of a chat is kept, for either truncation side of the tokenizer."""
    tokenizer = torch_chats.tokenizer(None)
    untruncated = ChatCollator(tokenizer)(CHATS)
    tokenizer.truncation_side = "left"
    short = ChatCollator(tokenizer, max_length=15)(CHATS)
    assert short["input_ids"].shape == (2, 15)
    assert torch.equal(short["input_ids"][0], untruncated["input_ids"][0, :15])
    assert torch.equal(short["labels"][0], untruncated["labels"][0, :15])


def test_bad_input() -> None:
    tokenizer = torch_chats.tokenizer(None)
    with pytest.raises(InputError, match=r"max_length .*\b1$"):
        ChatCollator(tokenizer, max_length=1)
    with pytest.raises(InputError, match=r"max_length.*\b3\b"):
        ChatCollator(tokenizer, max_length=3)(CHATS)
    with pytest.raises(InputError, match="messages"):
        ChatCollator(tokenizer)([{"text": "a"}])
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat_template"):
        ChatCollator(tokenizer)
    with pytest.raises(InputError, match=r"^tokenizer .*object"):
        ChatCollator(object())


def test_an_answer_of_the_first_token_alone_is_refused() -> None:
    """Labels are shifted by one, so that the first token of a row is never predicted."""
    tokenizer = torch_chats.tokenizer(None)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    answer, question = {"role": "assistant", "content": "d"}, {"role": "user", "content": "o"}
    with pytest.raises(InputError, match=r"none of 1 chats .* max_length 1024"):
        ChatCollator(tokenizer)([{"messages": [answer, question]}])
    assert learned(tokenizer, ChatCollator(tokenizer)([{"messages": [question, answer]}])) == [["d"]]
