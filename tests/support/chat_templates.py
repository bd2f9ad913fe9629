"""Chat templates that write chats as the published ones of model families do, and the resulting texts."""

from typing import Any

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN25 = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe Qwen.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe SmolLM.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
    {{- m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Writes an empty thought into the last turn alone."""

QWEN25_CALLS = """{%- for m in messages %}
    {{- '<|im_start|>' + m.role }}
    {%- if m.content or not m.tool_calls %}{{ '\\n' + m.content }}{% endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Begins a turn's header and its line break apart, and encodes the arguments of tool calls."""

QWEN3_CALLS = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set said, thought = m.content, m.reasoning_content or '' %}
    {%- if '</think>' in said %}
        {%- set thought = said.split('</think>')[0].removeprefix('<think>').strip('\\n') %}
        {%- set said = said.split('</think>')[1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- said }}
    {%- for call in m.tool_calls or [] %}
        {%- if said or not loop.first %}{{ '\\n' }}{% endif %}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}
        {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Writes thoughts only after the last question, and an empty one in the last turn; a line break before a tool call only
after content."""

MISTRAL3 = (
    "{{ bos_token }}{% set ns = namespace(said='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.said = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] {{ ns.said if loop.index >= messages | length - 1 }}{{ m.content }}[/INST]"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
"""Writes what the system says into the last question."""

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
INDENTED = """
{% for m in messages %}
    {% if m.role == 'assistant' %}
    A: {{ m.content }}
    {% else %}
Q: {{ m.content }}
    {% endif %}
{% endfor %}
"""
TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson(indent=1) }}{% endfor %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{% continue %}{% endif %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{% endfor %}"
)

ALL = {
    "llama3": LLAMA3,
    "qwen2.5": QWEN25,
    "mistral": MISTRAL,
    "smollm2": SMOLLM2,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "mistral3": MISTRAL3,
    "tools": TOOLS,
    "indented": INDENTED,
}


def turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Return a chat of alternating turns of the user and the assistant, after the system's if there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CHAT = turns("Is it <b>?", "Yes. ", "Ähm, sure?", "Sure.")

TEXTS = {
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nIs it <b>?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nÄhm, sure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Sure.<|eot_id|>⟧"
    ),
    "qwen2.5": (
        "<|im_start|>system\nBe Qwen.<|im_end|>\n<|im_start|>user\nIs it <b>?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes. <|im_end|>\n⟧<|im_start|>user\nÄhm, sure?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Sure.<|im_end|>\n⟧"
    ),
    "mistral": "<s>[INST] Is it <b>? [/INST]⟦ Yes. </s>⟧[INST] Ähm, sure? [/INST]⟦ Sure.</s>⟧",
    "smollm2": (
        "<|im_start|>system\nBe SmolLM.<|im_end|>\n<|im_start|>user\nIs it <b>?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes. <|im_end|>\n⟧<|im_start|>user\nÄhm, sure?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Sure.<|im_end|>\n⟧"
    ),
    "gemma": (
        "<s><start_of_turn>user\nIs it <b>?<end_of_turn>\n<start_of_turn>model\n⟦Yes.<end_of_turn>\n⟧"
        "<start_of_turn>user\nÄhm, sure?<end_of_turn>\n<start_of_turn>model\n⟦Sure.<end_of_turn>\n⟧"
    ),
    "qwen3": (
        "<|im_start|>user\nIs it <b>?<|im_end|>\n<|im_start|>assistant\n⟦Yes. <|im_end|>\n⟧"
        "<|im_start|>user\nÄhm, sure?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nSure.<|im_end|>\n⟧"
    ),
    "mistral3": "<s>[INST] Is it <b>?[/INST]⟦ Yes.</s>⟧[INST] Ähm, sure?[/INST]⟦ Sure.</s>⟧",
    "indented": "\nQ: Is it <b>?\n⟦    A: Yes. \n⟧Q: Ähm, sure?\n⟦    A: Sure.\n⟧",
    "tools": "<user>Is it <b>?⟦<assistant>Yes. ⟧<user>Ähm, sure?⟦<assistant>Sure.⟧",
}
"""What each writes of `CHAT`, the assistant's letters between marks."""
