"""Templates that would never end, or take all memory, are stopped with a line that says so."""

from __future__ import annotations

import pytest

from dsalign.data.tokens import limits
from dsalign.data.tokens.load_template import load_template

BOMBS = {
    "power": "{{ 9 ** 99999999 }}",
    "repeated text": "{{ 'x' * 3000000000 }}",
    "repeated list": "{{ 3000000000 * [1] }}",
    "width": "{{ '%3000000000d' % 1 }}",
    "filter": "{{ 'x' | center(3000000000) }}",
    "method": "{{ 'x'.ljust(3000000000) }}",
    "replace": "{% set a = 'x' * 9000000 %}{{ a.replace('x', 'yyyyyyyyyy') }}",
    "format": "{{ '{:3000000000}'.format(1) }}",
}


@pytest.mark.parametrize("case", BOMBS)
def test_one_operation_is_bounded(make_tokenizer, case):
    tokenizer = make_tokenizer(chat_template=BOMBS[case])
    with pytest.raises(ValueError, match=r"^template .*it says: one operation of it makes \d+"):
        load_template(tokenizer, None, [])[0].render([{"role": "user", "content": "q"}])


def test_loops_end_by_time_and_memory(make_tokenizer, monkeypatch):
    """10^10 turns of a loop that writes nothing; a text that doubles 60 times."""
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(limits, "CPU_S", 0.2)
    with pytest.raises(ValueError, match="it took more than 0 s"):
        load_template(make_tokenizer(chat_template=loops), None, [])
    doubles = "{% set n = namespace(x='x' * 1000) %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
    monkeypatch.setattr(limits, "CPU_S", 60)
    monkeypatch.setattr(limits, "MEMORY_BYTES", 200 << 20)
    with pytest.raises(ValueError, match=r"it took more than 0 GiB of memory|MemoryError"):
        load_template(make_tokenizer(chat_template=doubles), None, [])


def test_small_operations_are_as_ever():
    written = limits.bounded_template(
        "{{ 2 ** 10 }} {{ 'ab' * 2 }} {{ '%03d' % 7 }} {{ 'a' | center(3) }} {{ [1, 2] | join('-') }} {{ 'x' + 'y' }} "
        "{{ {'a': '<'} | tojson }}{% for i in range(3) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    ).render()
    assert written == '1024 abab 007  a  1-2 xy {"a": "<"}01'
