"""Chats as text: equal to transformers', with the assistant's turns located, and templates without side effects."""

import copy
import itertools
import re
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
import tokenizers
import transformers
from support import chat_templates

from rora_theory.chat_templates import CHATML, ChatTemplate
from rora_theory.errors import InputError
from rora_theory.lab.data import chat, texts
from rora_theory.lab.data.formats import Chat, Record, Text
from rora_theory.lab.data.prompt_preview import preview_prompt
from rora_theory.lab.finetune import Batches, tokenize
from rora_theory.lab.llama.tokenizer import Tokenizer

CHAT, turns = chat_templates.CHAT, chat_templates.turns
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
WEATHER = [{"type": "function", "function": {"name": "weather", "description": "É <b>"}}]


def marked(written) -> str:
    text, at = "", 0
    for begin, end in written.spans:
        text, at = f"{text}{written.text[at:begin]}⟦{written.text[begin:end]}⟧", end
    return text + written.text[at:]


@pytest.fixture(scope="module")
def tokenizer(model_folder) -> Tokenizer:
    """Return a tokenizer of bytes, which puts a beginning token before every text that is not a chat."""
    tokenizer = Tokenizer.from_folder(model_folder)
    tokenizer.backend.chat_template = chat_templates.LLAMA3
    tokenizer.backend.add_bos_token = True
    return tokenizer


COUNTED = (
    "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{% if m.thinking %}({{ m.thinking }}){% endif %}"
    "{{ '-' }}{{ m.content + '-' if m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Begins with the number of messages, so that no beginning of a chat is written like the chat."""
HIDING = "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else '...' }}{% endfor %}"
"""Template that omits all turns but the last."""
NEWEST_FIRST = "{% for m in messages[:2] + messages[2:] | reverse | list %}<{{ m.role }}>{{ m.content }}{% endfor %}"
"""Template that writes the third answer before the second."""
ENDING = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '<end>' if loop.last else '<next>' }}{% endfor %}"
"""Template that ends a turn differently if others follow."""
PREPENDING = "{{ '!' if add_generation_prompt }}" + COUNTED
"""Template that also changes the beginning if a generation prompt is requested."""
THOUGHT = [CHAT[0], CHAT[1] | {"thinking": "Hm."}, *CHAT[2:]]
LOCATED = {name: (source, CHAT, chat_templates.TEXTS[name]) for name, source in chat_templates.ALL.items()} | {
    "generation blocks": (
        chat_templates.MARKED,
        CHAT[:2],
        "<|im_start|>user\nIs it <b>?<|im_end|>\n<|im_start|>assistant\n⟦Yes. <|im_end|>⟧",
    ),
    "a system prompt with the answer's words in the last question": (
        chat_templates.MISTRAL3,
        turns("Is it <b>?", "Yes. ", "Sure.", "Sure.", system="Sure."),
        "<s>[INST] Is it <b>?[/INST] ⟦Yes.</s>⟧[INST] Sure.\n\nSure.[/INST]⟦ Sure.</s>⟧",
    ),
    "equal questions and answers": (
        chat_templates.MISTRAL3,
        turns(*["Well?", "Yes."] * 3, system="Be brief."),
        f"<s>{'[INST] Well?[/INST] ⟦Yes.</s>⟧' * 2}[INST] Be brief.\n\nWell?[/INST]⟦ Yes.</s>⟧",
    ),
    "turns of the end token's words, all of which end alike": (
        chat_templates.MISTRAL3.replace("[/INST]", "<|end|>").replace("eos_token", "'<|end|>'"),
        turns(*["end"] * 4, system="Be brief."),
        "<s>[INST] end<|end|> ⟦end<|end|>⟧[INST] Be brief.\n\nend<|end|>⟦ end<|end|>⟧",
    ),
    "a question after the last answer": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        turns("Well?", "Yes.", "Sure?"),
        "<user>Well?<end><assistant>⟦Yes.<end>⟧<user>Sure?<end>",
    ),
    "thoughts, and a text before each turn that changes with the chat": (
        COUNTED,
        THOUGHT,
        "4<user>-Is it <b>?-<end><assistant>⟦(Hm.)-Yes. -<end>⟧<user>-Ähm, sure?-<end><assistant>⟦-Sure.-<end>⟧",
    ),
}


@pytest.mark.parametrize("name", LOCATED)
def test_texts_and_turns_follow_the_template(name):
    """Mistral 3 and COUNTED write the first turns differently while they are the last ones."""
    source, messages, expected = LOCATED[name]
    assert marked(ChatTemplate(source, tokens=TOKENS).render_with_spans(messages)) == expected


@pytest.mark.parametrize(
    ("source", "messages", "index"),
    [
        (HIDING, turns("Yes.", "Yes.", "Yes."), 1),
        (COUNTED, [CHAT[0], CHAT[1] | {"content": ""}, *CHAT[2:]], 1),
        (NEWEST_FIRST, [*CHAT, *turns("Well?", "Of course.")], 5),
        (ENDING, CHAT, 1),
        (PREPENDING, THOUGHT, 1),
    ],
)
def test_a_turn_that_cannot_be_located_is_refused_if_only_turns_are_learned(source, messages, index):
    record = Chat(tuple(messages), where="chats.jsonl: line 7")
    with pytest.raises(InputError, match=rf"^chats\.jsonl: line 7: messages {index}: .*chat_template"):
        texts.render_record(record, "chat", ChatTemplate(source))
    text, spans = texts.render_record(record, "chat", ChatTemplate(source), answer_only=False)
    assert spans == ((0, len(text)),)


def test_texts_and_masks_equal_transformers(tokenizer):
    peer = tokenizer.backend
    chats = [CHAT, CHAT[:2], CHAT[:3], turns(*(message["content"] for message in CHAT), system="Be brief.")]
    thought = {"role": "assistant", "content": "a", "thinking": "b", "tool_calls": [{"name": "weather"}]}
    sources = [*chat_templates.ALL.values(), chat_templates.MARKED, CHATML]
    compared = 0
    for source, messages, prompt in itertools.product(sources, [*chats, [*CHAT[:3], thought]], (False, True)):
        ours = ChatTemplate(source, tokens=TOKENS)
        options = {"tools": WEATHER, "chat_template": source, "add_generation_prompt": prompt}
        try:
            expected = peer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:
            with pytest.raises(InputError, match=str(error)):
                ours.render(messages, WEATHER, add_generation_prompt=prompt)
        else:
            assert ours.render(messages, WEATHER, add_generation_prompt=prompt) == expected, source
            compared += 1
    assert compared > 80
    marks = {"return_assistant_tokens_mask": True, "return_dict": True}
    peer_output = peer.apply_chat_template(CHAT, chat_template=chat_templates.MARKED, **marks)
    template = ChatTemplate(chat_templates.MARKED)
    examples = tokenize([Chat(tuple(CHAT))], tokenizer, template="chat", answer_only=True, chat=template)
    assert examples[0].tolist() == peer_output["input_ids"]
    assert examples.is_target.astype(int).tolist() == peer_output["assistant_masks"]
    assert 0 < sum(peer_output["assistant_masks"]) < len(peer_output["assistant_masks"])


def test_all_chats_that_a_template_cannot_render_are_listed():
    chats = [Chat(tuple(messages), where=f"line {line}") for line, messages in enumerate((CHAT, CHAT[:2], CHAT))]
    wrong = ": turns .* got user, assistant, user, assistant"
    with pytest.raises(InputError, match=rf"^2 of 3 .*line 0{wrong}.*line 2{wrong}"):
        texts.render_records(chats, "clean")


PICKY = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}{% endfor %}"
"""Refuses chats with the content "no"."""


def chat_of(content, line):
    return Chat((CHAT[0], CHAT[1] | {"content": content}), where=f"x.jsonl: line {line}")


def test_all_chats_that_a_template_refuses_are_listed():
    records = [chat_of(content, line) for line, content in enumerate(["yes", "no", "yes", "no"], start=1)]
    with pytest.raises(InputError, match=r"^2 of 4 .*\(1\) x\.jsonl: line 2: .*\(2\) x\.jsonl: line 4: .*not this"):
        texts.render_records(records, "chat", ChatTemplate(PICKY + CHATML))


def test_a_chat_template_has_no_effect_on_other_templates():
    """Records are rendered by the template that is named, and by the chat template only if that is named `chat`."""
    records, template = [Record("Who?", "I."), Record("What?", "It.")], ChatTemplate(CHATML)
    for name in ("clean", "plain"):
        expected = [texts.render_record(record, name) for record in records]
        assert texts.render_records(records, name, template) == expected
    with pytest.raises(InputError, match=r"template .*'chat'.*no chat template"):
        texts.render_records(records, "chat")


@pytest.mark.parametrize("name", ["MARKED", "MISTRAL3", "LLAMA3"])
def test_turns_of_weight_0_are_not_learned(name):
    template = ChatTemplate(getattr(chat_templates, name), tokens=TOKENS)
    messages = [*CHAT, *turns("Well?", "Yes.")]
    text, spans = template.render_with_spans(messages)
    ignored = Chat((*messages[:3], messages[3] | {"weight": 0}, *messages[4:]))
    assert texts.render_record(ignored, "chat", template) == (text, (spans[0], spans[2]))
    begin, end = spans[1]
    rendered = texts.render_record(ignored, "chat", template, answer_only=False)
    assert rendered == (text, ((0, begin), (end, len(text))))
    # The text ends with the last answer, so no part follows it.
    ignored = Chat((*messages[:5], messages[5] | {"weight": 0}))
    rendered = texts.render_record(ignored, "chat", template, answer_only=False)
    assert rendered == (text, ((0, spans[2][0]),))


def test_other_turns_of_weight_0_are_refused_if_all_tokens_are_learned():
    template = ChatTemplate(CHATML)
    record = Chat((CHAT[0] | {"weight": 0}, *CHAT[1:]), where="x.jsonl: line 2")
    assert texts.render_record(record, "chat", template) == template.render_with_spans(CHAT)
    with pytest.raises(InputError, match=r"x\.jsonl: line 2: messages 0: weight .* user"):
        texts.render_record(record, "chat", template, answer_only=False)


def test_a_wrong_number_of_generation_marks_is_refused():
    twice = "{% for m in messages %}" + "{% generation %}a{% endgeneration %}" * 2 + "{% endfor %}"
    with pytest.raises(InputError, match=r"2 assistant turns .* got 8 marks"):
        ChatTemplate(twice).render_with_spans([CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]])


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
ANSWERS = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Hm."},
    {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSure."},
    {"role": "assistant", "content": "Sure.", "reasoning_content": "Hm."},
]


@pytest.mark.parametrize("name", ["QWEN25_CALLS", "QWEN3_CALLS"])
def test_turns_with_tool_calls_and_thoughts_are_located(name):
    """This holds also if a template writes a turn differently before other turns, and for empty content.

    The line break that the generation prompt ends in is not learned, although QWEN25_CALLS writes it with the turn.
    """
    template = ChatTemplate(getattr(chat_templates, name))
    question, result = {"role": "user", "content": "Sure?"}, {"role": "tool", "content": "sun"}
    for first, second, third in itertools.product(ANSWERS, repeat=3):
        follows = result if "tool_calls" in first else question
        text, spans = template.render_with_spans([question, first, follows, second, question, third])
        # Both templates mark a turn's begin and end in the same way.
        matches = re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", text, re.DOTALL)
        assert list(spans) == [match.span(1) for match in matches]


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """Return a tokenizer of bytes that also merges two pairs of letters across word boundaries."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "ĊY", "!Ċ"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("Ċ", "Y"), ("!", "Ċ")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    options = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options))


def mark_tokens(examples, tokenizer) -> str:
    """Return the first record's tokens, separated by spaces, with those in the loss in brackets."""
    tokens = [tokenizer.decode([token], skip_special=False).replace("\n", "↵") for token in examples[0].tolist()]
    masked = zip(tokens, examples.target_mask(0).tolist(), strict=True)
    return " ".join(f"[{token}]" if in_loss else token for token, in_loss in masked)


def test_every_token_that_overlaps_a_turn_is_in_the_loss(merging):
    """This includes a token that an answer shares with its header, and the end token."""
    template = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role != 'user' %}<|im_end|>{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = turns("Yo!", "Yes", "So", "No")
    examples = tokenize([Chat(tuple(messages))], merging, cutoff=1000, answer_only=True, chat=template)
    assert mark_tokens(examples, merging) == (
        "<|im_start|> u s e r ↵Y o !↵ <|im_start|> a s s i s t a n t [↵Y] [e] [s] [<|im_end|>] [↵] "
        "<|im_start|> u s e r ↵ S o ↵ <|im_start|> a s s i s t a n t ↵ [N] [o] [<|im_end|>] [↵]"
    )
    ignored = Chat((messages[0], messages[1] | {"weight": 0}, *messages[2:]))
    examples = tokenize([ignored], merging, cutoff=1000, chat=template)
    left_out = [token for token in mark_tokens(examples, merging).split() if not token.startswith("[")]
    assert left_out == ["<|im_start|>", "e", "s", "<|im_end|>", "↵"]  # the first token is no target
    examples = tokenize([Record("So?\n", "Yes!")], merging, template="plain", answer_only=True)
    assert mark_tokens(examples, merging) == "S o ? [↵Y] [e] [s] [!] [</s>]"


def test_the_date_can_be_set():
    template = ChatTemplate(chat_templates.DATED, now=datetime(2024, 7, 26))
    assert template.render(CHAT[:1]).startswith("26 Jul 2024<user>")
    assert template.identity()["chat_date"] == "2024-07-26"
    assert "chat_date" not in ChatTemplate(CHATML).identity()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only users') }}", "rejects the chat .only users."),
        ("{{ messages[0].content.nothing.more }}", "rejects the chat"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "rejects the chat .*'_x'"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange too big"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_failing_and_unsafe_templates_are_refused_in_one_line(source, message):
    with pytest.raises(InputError, match=message) as caught:
        ChatTemplate(source, where="FOLDER").render(CHAT)
    assert str(caught.value).startswith("FOLDER: the chat template rejects the chat")
    assert "\n" not in str(caught.value)


def test_a_missing_template_or_jinja_names_the_alternatives(tmp_path, tokenizer):
    without_template = replace(tokenizer, backend=copy.copy(tokenizer.backend))
    without_template.backend.chat_template = None
    with pytest.raises(InputError, match=r"has no chat template.* chat_template FILE .* template clean"):
        chat.load_chat_template(without_template)
    path = tmp_path / "t.jinja"
    path.write_text("{% if %}")
    with pytest.raises(InputError, match=r"t\.jinja: the chat template is not Jinja"):
        chat.read_template_source(str(path))
    path.write_text("{{ bos_token }}{{ messages[0].content }}")
    assert chat.load_chat_template(tokenizer, str(path)).render(CHAT) == "<s>Is it <b>?"
    assert chat.load_chat_template(without_template, "chatml").source == CHATML


def test_other_templates_take_one_question_and_its_answer():
    conversation = Chat(tuple(CHAT[:2]))
    assert texts.render_record(conversation, "plain").text == "Is it <b>?Yes. "
    assert texts.render_record(conversation, "clean") == texts.render_record(Record("Is it <b>?", "Yes. "), "clean")
    with pytest.raises(InputError, match=r"template .* plain .* got 'train'"):
        texts.render_record(Text("a"), "train")
    with pytest.raises(InputError, match=r"^the record 'Say\.': .* rejects the chat \(no\)"):
        texts.render_record(Record("Say.", "It."), "chat", ChatTemplate("{{ raise_exception('no') }}"))
    rendered = texts.render_record(Record("Say.", "It.", "Now"), "chat", ChatTemplate(CHATML))
    assert marked(rendered) == "<|im_start|>user\nSay.\n\nNow<|im_end|>\n<|im_start|>assistant\n⟦It.<|im_end|>\n⟧"


def test_the_tokens_of_a_chat_come_from_the_template_alone(tokenizer):
    """There is no second beginning token and no end token. Exactly the assistant's turns are targets."""
    record = Chat(tuple(CHAT))
    examples = tokenize([record, record], tokenizer, cutoff=1000, answer_only=True)
    text = chat_templates.TEXTS["llama3"].replace("⟦", "").replace("⟧", "")
    assert tokenizer.decode(examples[0].tolist(), skip_special=False) == text
    assert examples[0].tolist().count(0) == 1
    assert examples[0].tolist().count(1) == 0
    assert [preview_prompt(examples, index, tokenizer) for index in range(2)] == [chat_templates.TEXTS["llama3"]] * 2

    all_targets = tokenize([record], tokenizer, cutoff=1000)
    assert all_targets.is_target.tolist() == [False] + [True] * (len(all_targets.tokens) - 1)

    cut = tokenize([record], tokenizer, cutoff=115, answer_only=True)
    assert (len(cut.tokens), cut.truncated) == (115, 1)
    assert cut.is_target.tolist() == examples.is_target[:115].tolist()
    with pytest.raises(InputError, match=r"cutoff .* 1 records, got 60"):
        tokenize([record], tokenizer, cutoff=60, answer_only=True)


def test_batches_hold_every_turn(tokenizer):
    records = [Chat(tuple(CHAT)), Record("Say it.", "It."), Chat(tuple(CHAT[:2]))]
    by_loss = {
        only: tokenize(records, tokenizer, cutoff=1000, template="chat", answer_only=only) for only in (True, False)
    }
    assert np.array_equal(by_loss[True].tokens, by_loss[False].tokens)
    answer_batch = Batches(by_loss[True], (512,), batch_size=3, answer_only=True)[0]
    full_batch = Batches(by_loss[True], (512,), batch_size=3)[0]
    for row in range(3):
        tokens, learned = by_loss[True][row], by_loss[True].target_mask(row)
        counted = answer_batch.weights[row] == 1
        assert answer_batch.targets[row][counted].tolist() == tokens[learned].tolist()
        assert (answer_batch.positions[row][counted] + 1).tolist() == np.flatnonzero(learned).tolist()
        assert full_batch.targets[row][full_batch.weights[row] == 1].tolist() == tokens[learned].tolist()
    assert answer_batch.targets.shape[1] == -(-int(by_loss[True].target_counts.max()) // 8) * 8
    assert by_loss[True].target_counts.tolist() == [int(by_loss[True].target_mask(i).sum()) for i in range(3)]
    assert by_loss[True].first_targets.tolist() == [int(np.argmax(by_loss[True].target_mask(i))) for i in range(3)]


def test_letters_of_several_bytes_belong_to_all_of_their_tokens(tokenizer):
    record = Chat(({"role": "user", "content": "é"}, {"role": "assistant", "content": "日é"}))
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    examples = tokenize([record], tokenizer, template="chat", answer_only=True, chat=template)
    assert examples.is_target.tolist() == [False] * 2 + [True] * 5


def test_plain_texts_have_no_answer(tokenizer):
    examples = tokenize([Text("ab")], tokenizer)
    assert examples.tokens.tolist()[0::3] == [0, 1]
    assert examples.is_target.tolist() == [False, True, True, True]
    with pytest.raises(InputError, match=r"loss_on .*'all' .* got 'answer'"):
        tokenize([Text("ab")], tokenizer, answer_only=True)


def test_a_whole_text_is_in_the_loss_from_its_first_character():
    for record, length in ((Text("abc"), 3), (Record("2 + 2 = ", "4"), 9)):
        assert texts.render_record(record, "plain", answer_only=False).spans == ((0, length),)
