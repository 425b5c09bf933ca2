"""Limits of time and memory for a chat template: it is a program that came with a model, and it may never end."""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

CPU_S = 10.0  # of the thread that renders; a stopped or crowded process uses none
MEMORY_BYTES = 2 << 30  # that the process grows by while a template renders
MAX_SIZE = 10_000_000  # characters, elements or bits that one operation may make
POLL_S = 0.05
WIDTH = re.compile(r"\d{7,}|\*")  # a field's width in a format


class TooMuch(Exception):
    """A template that took more time or memory than any needs."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "it took too much time or memory"


class Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no single operation makes more than MAX_SIZE characters, elements or bits: such an
    operation could not be ended from outside."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of left `operator` right. Raises TemplateError where it would be too large."""
        if operator == "*":
            _allow(_size(left) * right if isinstance(right, int) and not isinstance(left, int | float) else 0)
            _allow(_size(right) * left if isinstance(left, int) and not isinstance(right, int | float) else 0)
        if operator in "**" and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            _allow(sum(bits) if operator == "*" else bits[0] * min(abs(right), MAX_SIZE + 1))
        if operator == "+" and isinstance(left, str | list | tuple):
            _allow(_size(left) + _size(right))
        if operator == "%" and isinstance(left, str):
            _allow(MAX_SIZE + 1 if WIDTH.search(left) else len(left))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """The result of a call in a template. Raises TemplateError where it would be too large."""
        for number in (*args, *kwargs.values()):
            if isinstance(number, int):
                _allow(abs(number))
        method = getattr(function, "__wrapped__", function)  # Jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            name = getattr(method, "__name__", "")
            if name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
                _allow(owner.count(args[0]) * len(args[1]))
            if name in ("format", "format_map"):
                _allow(MAX_SIZE + 1 if WIDTH.search(owner) else 0)
            if name == "join" and args and isinstance(args[0], list | tuple):
                _allow(sum(_size(item) + len(owner) for item in args[0]))
        return super().call(context, function, *args, **kwargs)


def _size(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _allow(size: int) -> None:
    if size > MAX_SIZE:
        raise TemplateError(f"one operation of it makes {size} characters, elements or bits, more than {MAX_SIZE}")


def bounded_template(source: str) -> Any:
    """A chat template, compiled with what transformers gives to every template, within `Bounded`.

    Raises TemplateSyntaxError where it is none, TooMuch where compiling takes too much.
    """
    theirs = chat_template_utils._compile_jinja_template("").environment  # it would compute constants without limit
    ours = Bounded(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
    )
    ours.globals.update(theirs.globals)
    ours.globals.pop("lipsum", None)  # makes text without limit
    ours.filters.update(theirs.filters)
    for name in ("center", "indent", "round", "replace", "join", "format", "wordwrap", "batch", "slice"):
        ours.filters[name] = _limited(name, ours.filters[name])
    with watch.over():
        return ours.from_string(source)


def _limited(name: str, filtered: Any) -> Any:
    """A filter that refuses numbers beyond MAX_SIZE and results that would have more characters."""

    def limited(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        for value in given:
            if isinstance(value, int):
                _allow(abs(value))
        texts = [value for value in given if isinstance(value, str)]
        if name == "format" and any(WIDTH.search(text) for text in texts):
            _allow(MAX_SIZE + 1)
        if name == "replace" and len(texts) > 2:
            _allow(texts[0].count(texts[1]) * len(texts[2]))
        if name == "join":
            between = len(texts[0]) if texts else 0
            _allow(sum(_size(x) + between for value in given if isinstance(value, list | tuple) for x in value))
        return filtered(*args, **kwargs)

    if hasattr(filtered, "jinja_pass_arg"):  # some filters are given the environment first
        limited.jinja_pass_arg = filtered.jinja_pass_arg  # type: ignore[attr-defined]
    return limited


class _Watch:
    """A thread that ends what renders for too long, or with too much memory, by an exception in its thread."""

    def __init__(self) -> None:
        self._lock, self._started, self._wake = threading.Lock(), False, threading.Event()
        self._watched: dict[int, list[Any]] = {}  # thread -> [clock, CPU-seconds at the start, memory, what it did]

    @contextmanager
    def over(self) -> Iterator[None]:
        """A block in which this thread renders. Raises TooMuch from within it."""
        thread = threading.get_ident()
        clock = time.pthread_getcpuclockid(thread) if hasattr(time, "pthread_getcpuclockid") else None
        entry: list[Any] = [clock, _cpu_s(clock), _memory(), ""]
        with self._lock:
            self._watched[thread] = entry
            if not self._started:
                self._started = True
                threading.Thread(target=self._run, name="template limits", daemon=True).start()
            self._wake.set()
        try:
            yield
        except TooMuch:
            raise TooMuch(entry[3]) from None
        finally:
            with self._lock:
                self._watched.pop(thread, None)
            if entry[3]:  # it may not have arrived yet: take it back
                _raise_in(thread, None)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(POLL_S)
            with self._lock:
                for thread, entry in self._watched.items():
                    clock, start_s, start_bytes, done = entry
                    if done:
                        continue
                    if _cpu_s(clock) - start_s > CPU_S:
                        entry[3] = f"it took more than {CPU_S:.0f} s"
                    elif _memory() - start_bytes > MEMORY_BYTES:
                        entry[3] = f"it took more than {MEMORY_BYTES >> 30} GiB of memory"
                    if entry[3]:
                        _raise_in(thread, TooMuch)
                if not self._watched:
                    self._wake.clear()


def _cpu_s(clock: int | None) -> float:
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _memory() -> int:
    """Resident bytes of this process; 0 where the system does not say it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)


watch = _Watch()


def rendered(
    template: Any, conversations: Sequence[Any], tools: Sequence[Any] | None, given: Mapping[str, Any]
) -> list[str]:
    """Each conversation as text. template: of `bounded_template`, which gets lists as transformers gives them, since it
    may add to them. given: what else it may read.

    Raises TooMuch where the template takes more than CPU_S or MEMORY_BYTES, and whatever the template raises.
    """
    with watch.over():
        return [template.render(messages=list(turns), tools=tools, documents=None, **given) for turns in conversations]
