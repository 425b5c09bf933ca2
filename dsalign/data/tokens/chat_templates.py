"""Built-in chat templates, for base models that have none: how each family of models writes a conversation.

TURN_END stands for the family's own end token, or for the tokenizer's EOS where that is no single token of it. No
template writes a BOS: a tokenizer that wants one puts it in front.
"""

from __future__ import annotations

from typing import NamedTuple


class BuiltIn(NamedTuple):
    """A built-in template. text: Jinja. turn_end: the token that ends a turn, None = the tokenizer's EOS."""

    text: str
    turn_end: str | None = None


_EACH = "{% for message in messages %}"
_OPEN = "{% if add_generation_prompt %}"
# Tools between tags, as models of the Hermes and Qwen families have them: what can be called in the system's turn, a
# call behind the assistant's text, what tools answered in a turn of the user.
CHATML = (
    "{% set turns = messages %}{% if tools %}"
    "{{ '<|im_start|>system\\n' }}{% if messages and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\\n\\n' }}{% set turns = messages[1:] %}{% endif %}"
    "{{ 'These functions can be called:\\n<tools>\\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}"
    '{{ \'</tools>\\nA call is written as\\n<tool_call>\\n{"name": name, "arguments": {...}}\\n</tool_call>\' }}'
    "{{ TURN_END + '\\n' }}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'tool' %}"
    "{% if loop.first or loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem['role'] != 'tool' %}{{ TURN_END + '\\n' }}{% endif %}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% if message['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n' + call['function'] | tojson + '\\n</tool_call>' }}{% endfor %}"
    "{{ TURN_END + '\\n' }}{% endif %}{% endfor %}" + _OPEN + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Families without a system role put it in front of the first question.
_SYSTEM_FIRST = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set opening = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set opening = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'tool' %}{{ raise_exception('no turn of a tool') }}{% endif %}"
    "{% set text = (opening if loop.first else '') + message['content'] %}"
)
BUILT_IN: dict[str, BuiltIn] = {
    "chatml": BuiltIn(CHATML, "<|im_end|>"),
    "qwen": BuiltIn(
        "{% if not messages or messages[0]['role'] != 'system' %}"
        "{% set messages = [{'role': 'system', 'content': 'You are a helpful assistant.'}] + messages %}{% endif %}"
        "" + CHATML,
        "<|im_end|>",
    ),
    "llama3": BuiltIn(
        _EACH + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] + TURN_END }}{% endfor %}"
        "" + _OPEN + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        "<|eot_id|>",
    ),
    "gemma": BuiltIn(
        _SYSTEM_FIRST + "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}"
        "{{ '\\n' + text + TURN_END + '\\n' }}{% endfor %}" + _OPEN + "{{ '<start_of_turn>model\\n' }}{% endif %}",
        "<end_of_turn>",
    ),
    "mistral": BuiltIn(
        _SYSTEM_FIRST + "{% if message['role'] == 'assistant' %}{{ ' ' + text + TURN_END }}"
        "{% else %}{{ '[INST] ' + text + '[/INST]' }}{% endif %}{% endfor %}"
    ),
    "zephyr": BuiltIn(
        _EACH + "{{ '<|' + message['role'] + '|>\\n' + message['content'] + TURN_END + '\\n' }}{% endfor %}"
        "" + _OPEN + "{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    # No end token here: a completion gets its one when it is encoded.
    "plain": BuiltIn(_EACH + "{{ message['content'] }}{% endfor %}"),
}
