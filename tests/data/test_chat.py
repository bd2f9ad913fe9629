"""Chats as text: equal to transformers', every turn of the assistant's told apart, nothing that a template could do."""

import itertools
import re
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
import tokenizers
from support import chat_templates, checkpoint

from rora_theory.data import chat, prompt_preview, texts
from rora_theory.data.chat import ChatTemplate
from rora_theory.data.formats import Chat, Record, Text
from rora_theory.errors import InputError
from rora_theory.finetune import Batches, tokenize
from rora_theory.llama.tokenizer import Tokenizer

CHAT = chat_templates.CHAT
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
WEATHER = [{"type": "function", "function": {"name": "weather", "description": "É <b>"}}]


def marked(written) -> str:
    text, at = "", 0
    for begin, end in written.spans:
        text, at = f"{text}{written.text[at:begin]}⟦{written.text[begin:end]}⟧", end
    return text + written.text[at:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint.model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    """Of bytes, which puts a beginning token before every text that is no chat."""
    return replace(Tokenizer.from_folder(folder), chat_template=chat_templates.LLAMA3, prefix=(0,))


@pytest.mark.parametrize("name", chat_templates.ALL)
def test_texts_and_turns_are_the_families(name):
    written = ChatTemplate(chat_templates.ALL[name], tokens=TOKENS).render_with_spans(CHAT)
    assert marked(written) == chat_templates.TEXTS[name]


def test_texts_and_masks_equal_transformers(tokenizer):
    transformers = pytest.importorskip("transformers")
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **TOKENS)
    chats = [CHAT, CHAT[:2], CHAT[:3], [{"role": "system", "content": "Be brief."}, *CHAT]]
    thought = {"role": "assistant", "content": "a", "thinking": "b", "tool_calls": [{"name": "weather"}]}
    sources = chat_templates.ALL | {"marked": chat_templates.MARKED, "chatml": chat.CHATML}
    compared = 0
    for name, source in sources.items():
        ours = ChatTemplate(source, tokens=TOKENS)
        for messages in [*chats, [*CHAT[:3], thought]]:
            for prompt in (False, True):
                options = {"tools": WEATHER, "chat_template": source, "add_generation_prompt": prompt}
                try:
                    expected = peer.apply_chat_template(messages, tokenize=False, **options)
                except Exception as error:
                    with pytest.raises(InputError, match=str(error)):
                        ours.render(messages, WEATHER, add_generation_prompt=prompt)
                    continue
                assert ours.render(messages, WEATHER, add_generation_prompt=prompt) == expected, name
                compared += 1
    assert compared > 80
    found = peer.apply_chat_template(
        CHAT, chat_template=chat_templates.MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    own = ChatTemplate(chat_templates.MARKED)
    examples = tokenize([Chat(tuple(CHAT))], tokenizer, template="chat", answer_only=True, chat=own)
    assert examples[0].tolist() == found["input_ids"]
    assert examples.is_target.astype(int).tolist() == found["assistant_masks"]
    assert 0 < sum(found["assistant_masks"]) < len(found["assistant_masks"])


def test_marks_say_what_is_learned():
    written = ChatTemplate(chat_templates.MARKED).render_with_spans(CHAT)
    assert [written.text[begin:end] for begin, end in written.spans] == ["Yes. <|im_end|>", "Sure.<|im_end|>"]


@pytest.mark.parametrize("name", ["MARKED", "MISTRAL3", "LLAMA3"])
def test_given_turns_are_not_learned(name):
    """Of three answers, the two in the prompt: as if what is learned were the last one's alone."""
    template = ChatTemplate(getattr(chat_templates, name), tokens=TOKENS)
    messages = [*CHAT, {"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}]
    whole, given = template.render_with_spans(messages), template.render_with_spans(messages, context=5)
    assert (len(whole.spans), given) == (3, whole._replace(spans=whole.spans[2:]))
    assert texts.render_record(Chat(tuple(messages), context=5), "chat", template) == given


def test_what_is_marked_otherwise_than_by_turns_is_no_context():
    twice = (
        "{% for m in messages %}{% generation %}a{% endgeneration %}{% generation %}b{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"2 assistant turns .* got 8 marks"):
        ChatTemplate(twice).render_with_spans(CHAT, context=2)


def test_what_the_system_says_in_the_last_question():
    """The first turns are written otherwise as long as they are the last; a question that has the answer's words."""
    messages = [{"role": "system", "content": "Sure."}, CHAT[0], CHAT[1], {"role": "user", "content": "Sure."}, CHAT[3]]
    written = ChatTemplate(chat_templates.MISTRAL3, tokens=TOKENS).render_with_spans(messages)
    assert marked(written) == "<s>[INST] Is it <b>?[/INST] ⟦Yes.</s>⟧[INST] Sure.\n\nSure.[/INST]⟦ Sure.</s>⟧"


def test_the_same_answer_three_times_is_three_turns():
    messages = [{"role": "system", "content": "Be brief."}]
    for _ in range(3):
        messages += [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}]
    written = ChatTemplate(chat_templates.MISTRAL3, tokens=TOKENS).render_with_spans(messages)
    first = "[INST] Well?[/INST] ⟦Yes.</s>⟧"
    assert marked(written) == f"<s>{first}{first}[INST] Be brief.\n\nWell?[/INST]⟦ Yes.</s>⟧"


def test_a_question_in_the_answers_words_is_not_the_answer():
    same = [{"role": role, "content": "Yes."} for role in ("user", "assistant", "user", "assistant")]
    for name in ("qwen3", "llama3", "mistral"):
        written = ChatTemplate(chat_templates.ALL[name], tokens=TOKENS).render_with_spans(same)
        expected = chat_templates.TEXTS[name]
        for old in ("Yes. ", "Is it <b>?", "Ähm, sure?", "Sure."):
            expected = expected.replace(old, "Yes.")
        assert marked(written) == expected


def test_a_turn_is_told_from_others_of_the_same_words_and_from_the_end_token():
    """Where the first turns are written otherwise as long as they are the last, and every role's turn ends alike."""
    said = [{"role": "system", "content": "Be brief."}]
    for _ in range(2):
        said += [{"role": role, "content": "end"} for role in ("user", "assistant")]
    source = chat_templates.MISTRAL3.replace("[/INST]", "<|end|>").replace("eos_token", "'<|end|>'")
    written = ChatTemplate(source, tokens=TOKENS).render_with_spans(said)
    assert marked(written) == "<s>[INST] end<|end|> ⟦end<|end|>⟧[INST] Be brief.\n\nend<|end|>⟦ end<|end|>⟧"


def test_a_turn_that_is_left_out_is_not_a_later_one_of_its_words():
    hides = "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else '...' }}{% endfor %}"
    same = [{"role": role, "content": "Yes."} for role in ("user", "assistant", "user")]
    with pytest.raises(InputError, match="messages 1: the chat template writes this turn differently"):
        ChatTemplate(hides).render_with_spans(same)


def test_a_turn_that_is_not_in_the_text_is_refused_where_its_loss_is_asked_for():
    hides = "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else '...' }}{% endfor %}"
    record = Chat(tuple(CHAT), where="chats.jsonl: line 7")
    with pytest.raises(InputError, match=r"^chats\.jsonl: line 7: messages 1: .*--chat-template"):
        texts.render_record(record, "chat", ChatTemplate(hides))
    text, spans = texts.render_record(record, "chat", ChatTemplate(hides), answer_only=False)
    assert spans == ((0, len(text)),)


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
    """Also where the template writes a turn differently once others follow, and its content is empty."""
    template = ChatTemplate(getattr(chat_templates, name))
    question, result = {"role": "user", "content": "Sure?"}, {"role": "tool", "content": "sun"}
    for first, second, third in itertools.product(ANSWERS, repeat=3):
        follows = result if "tool_calls" in first else question
        text, spans = template.render_with_spans([question, first, follows, second, question, third])
        # Both templates mark a turn's begin and end in the same way.
        turns = re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", text, re.DOTALL)
        assert list(spans) == [turn.span(1) for turn in turns]


def test_turns_are_located_where_the_text_before_them_changes_with_the_chat():
    """As of a template that counts the messages. Thoughts are the turn's; what can't be told is refused."""
    template = ChatTemplate(
        "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{% if m.thinking %}({{ m.thinking }}){% endif %}"
        "{{ '-' }}{{ m.content + '-' if m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chats = [*CHAT[:1], CHAT[1] | {"thinking": "Hm."}, *CHAT[2:]]
    assert marked(template.render_with_spans(chats)) == (
        "4<user>-Is it <b>?-<end><assistant>⟦(Hm.)-Yes. -<end>⟧<user>-Ähm, sure?-<end><assistant>⟦-Sure.-<end>⟧"
    )
    with pytest.raises(InputError, match="messages 1: the chat template writes this turn differently"):
        template.render_with_spans([CHAT[0], CHAT[1] | {"content": ""}, *CHAT[2:]])


def test_the_line_break_that_the_generation_prompt_ends_in_is_not_learned():
    """Of a template that has it in a turn as in the prompt: at inference the model is given it."""
    template = ChatTemplate(chat_templates.QWEN25_CALLS)
    written = template.render_with_spans([CHAT[0], ANSWERS[0]])
    prompt = template.render(CHAT[:1], add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert written.text.startswith(prompt)
    assert written.spans == ((len(prompt), len(written.text)),)


@pytest.mark.parametrize("name", ["MARKED", "MISTRAL3", "LLAMA3"])
def test_turns_of_weight_0_are_not_in_the_loss(name):
    template = ChatTemplate(getattr(chat_templates, name), tokens=TOKENS)
    messages = [*CHAT, {"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}]
    text, spans = template.render_with_spans(messages)
    record = Chat((*messages[:3], messages[3] | {"weight": 0}, *messages[4:]))
    assert texts.render_record(record, "chat", template) == (text, (spans[0], spans[2]))
    (begin, end), whole = spans[1], texts.render_record(record, "chat", template, answer_only=False)
    assert whole == (text, ((0, begin), (end, len(text))))
    user = Chat((messages[0] | {"weight": 0}, *messages[1:]), where="x.jsonl: line 2")
    assert texts.render_record(user, "chat", template).spans == spans
    with pytest.raises(InputError, match=r"x\.jsonl: line 2: messages 0: weight must not be 0 in a turn of user"):
        texts.render_record(user, "chat", template, answer_only=False)


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """Of bytes, with two tokens of two letters that no boundary in a text keeps apart."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "ĊY", "!Ċ"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("Ċ", "Y"), ("!", "Ċ")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    ids = {"bos_id": backend.token_to_id("<s>"), "eos_id": backend.token_to_id("</s>")}
    return Tokenizer(backend, **ids, chat_template=chat.CHATML)


def masked(examples, tokenizer) -> list[tuple[str, bool]]:
    """Every token of the first record, and whether it is in the loss."""
    tokens = [tokenizer.decode([token], skip_special=False) for token in examples[0].tolist()]
    return list(zip(tokens, examples.target_mask(0).tolist(), strict=True))


def test_every_token_that_has_a_part_of_a_turn_is_in_the_loss(merging):
    """Among them a token that an answer shares with its header, and the end token."""
    template = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role != 'user' %}<|im_end|>{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    record = Chat(
        (
            {"role": "user", "content": "Yo!"},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": "So"},
            {"role": "assistant", "content": "No"},
        )
    )
    examples = tokenize([record], merging, cutoff=1000, answer_only=True, chat=template)
    asked = [("<|im_start|>", False), *((letter, False) for letter in "user")]
    header = [("<|im_start|>", False), *((letter, False) for letter in "assistant")]
    assert masked(examples, merging) == [
        *asked,
        ("\nY", False),
        ("o", False),
        ("!\n", False),
        *header,
        ("\nY", True),  # the header's line break and the answer's first letter
        ("e", True),
        ("s", True),
        ("<|im_end|>", True),
        ("\n", True),
        *asked,
        ("\n", False),
        ("S", False),
        ("o", False),
        ("\n", False),
        *header,
        ("\n", False),
        ("N", True),
        ("o", True),
        ("<|im_end|>", True),
        ("\n", True),
    ]
    ignored = Chat((*record.messages[:1], record.messages[1] | {"weight": 0}, *record.messages[2:]))
    examples = tokenize([ignored], merging, cutoff=1000, chat=template)
    left_out = [token for token, in_loss in masked(examples, merging) if not in_loss]
    assert left_out == ["<|im_start|>", "e", "s", "<|im_end|>", "\n"]  # the first token is no target


def test_every_token_that_has_a_part_of_a_response_is_in_the_loss(merging):
    examples = tokenize([Record("So?\n", "Yes!")], merging, template="plain", answer_only=True)
    assert masked(examples, merging) == [
        ("S", False),
        ("o", False),
        ("?", False),
        ("\nY", True),
        *((letter, True) for letter in "es!"),
        ("</s>", True),
    ]


def test_the_day_can_be_named():
    own = ChatTemplate(chat_templates.DATED, now=datetime(2024, 7, 26))
    assert own.render(CHAT[:1]).startswith("26 Jul 2024<user>")
    assert own.identity()["chat_date"] == "2024-07-26"
    assert "chat_date" not in ChatTemplate(chat.CHATML).identity()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only users') }}", "rejects the chat .only users."),
        ("{{ messages[0].content.nothing.more }}", "rejects the chat"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "rejects the chat .a namespace with the name '_x'"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange too big"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_or_reaches_further_is_one_line(source, message):
    with pytest.raises(InputError, match=message) as caught:
        ChatTemplate(source, where="FOLDER").render(CHAT)
    assert str(caught.value).startswith("FOLDER: the chat template rejects the chat")
    assert "\n" not in str(caught.value)


def test_no_template_and_no_jinja_name_the_choices(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"has no chat template.* --chat-template FILE .* --template clean"):
        chat.load_chat_template(replace(tokenizer, chat_template=None))
    path = tmp_path / "t.jinja"
    path.write_text("{% if %}")
    with pytest.raises(InputError, match=r"t\.jinja: the chat template is not Jinja"):
        chat.read_template_source(str(path))
    path.write_text("{{ bos_token }}{{ messages[0].content }}")
    assert chat.load_chat_template(tokenizer, str(path)).render(CHAT) == "<s>Is it <b>?"
    assert chat.load_chat_template(replace(tokenizer, chat_template=None), "chatml").source == chat.CHATML


def test_other_templates_take_one_question_and_its_answer():
    one = Chat(tuple(CHAT[:2]), where="x.json: record 3")
    assert texts.render_record(one, "plain").text == "Is it <b>?Yes. "
    assert texts.render_record(one, "clean") == texts.render_record(Record("Is it <b>?", "Yes. "), "clean")
    with pytest.raises(InputError, match=r"x\.json: record 3: turns .* got user, assistant, user, assistant"):
        texts.render_record(Chat(tuple(CHAT), where=one.where), "clean")
    with pytest.raises(InputError, match=r"template must be plain .* got 'train'"):
        texts.render_record(Text("a"), "train")
    with pytest.raises(InputError, match=r"^the record 'Say\.': .* rejects the chat \(no\)"):
        texts.render_record(Record("Say.", "It."), "chat", ChatTemplate("{{ raise_exception('no') }}"))
    asked = texts.render_record(Record("Say.", "It.", "Now"), "chat", ChatTemplate(chat.CHATML))
    assert marked(asked) == "<|im_start|>user\nSay.\n\nNow<|im_end|>\n<|im_start|>assistant\n⟦It.<|im_end|>\n⟧"


def test_a_chats_tokens_are_the_templates_alone(tokenizer):
    """No second beginning token, no end token; every turn of the assistant's is a target and nothing else."""
    record = Chat(tuple(CHAT))
    examples = tokenize([record, record], tokenizer, cutoff=1000, answer_only=True)
    text = chat_templates.TEXTS["llama3"].replace("⟦", "").replace("⟧", "")
    assert tokenizer.decode(examples[0].tolist(), skip_special=False) == text
    assert examples[0].tolist().count(0) == 1
    assert examples[0].tolist().count(1) == 0
    assert [one.text for one in prompt_preview.preview_prompts(examples, tokenizer, 5)] == [
        chat_templates.TEXTS["llama3"]
    ] * 2
    assert prompt_preview.preview_prompts(examples, tokenizer, 1)[0].in_loss == examples.target_mask(0).tolist()

    whole = tokenize([record], tokenizer, cutoff=1000)
    assert whole.is_target.tolist() == [False] + [True] * (len(whole.tokens) - 1)

    cut = tokenize([record], tokenizer, cutoff=115, answer_only=True)
    assert (len(cut.tokens), cut.truncated) == (115, 1)
    assert cut.is_target.tolist() == examples.is_target[:115].tolist()
    with pytest.raises(InputError, match=r"cutoff .* 1 records, got 60"):
        tokenize([record], tokenizer, cutoff=60, answer_only=True)


def test_batches_hold_every_turn(tokenizer):
    records = [Chat(tuple(CHAT)), Record("Say it.", "It."), Chat(tuple(CHAT[:2]))]
    found = {
        only: tokenize(records, tokenizer, cutoff=1000, template="chat", answer_only=only) for only in (True, False)
    }
    assert np.array_equal(found[True].tokens, found[False].tokens)
    few = Batches(found[True], (512,), batch_size=3, answer_only=True)[0]
    many = Batches(found[True], (512,), batch_size=3)[0]
    for row in range(3):
        tokens, learned = found[True][row], found[True].target_mask(row)
        counted = few.weights[row] == 1
        assert few.targets[row][counted].tolist() == tokens[learned].tolist()
        assert (few.positions[row][counted] + 1).tolist() == np.flatnonzero(learned).tolist()
        assert many.targets[row][many.weights[row] == 1].tolist() == tokens[learned].tolist()
    assert few.targets.shape[1] == -(-int(found[True].target_counts.max()) // 8) * 8
    assert found[True].target_counts.tolist() == [int(found[True].target_mask(i).sum()) for i in range(3)]
    assert found[True].first_targets.tolist() == [int(np.argmax(found[True].target_mask(i))) for i in range(3)]


def test_letters_of_several_bytes_belong_to_every_of_their_tokens(tokenizer):
    record = Chat(({"role": "user", "content": "é"}, {"role": "assistant", "content": "日é"}))
    own = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    examples = tokenize([record], tokenizer, template="chat", answer_only=True, chat=own)
    assert examples.is_target.tolist() == [False] * 2 + [True] * 5


def test_plain_texts_have_no_answer(tokenizer):
    examples = tokenize([Text("ab")], tokenizer)
    assert examples.tokens.tolist()[0::3] == [0, 1]
    assert examples.is_target.tolist() == [False, True, True, True]
    with pytest.raises(InputError, match=r"loss_on must be 'all' for texts.* got 'answer'"):
        tokenize([Text("ab")], tokenizer, answer_only=True)
