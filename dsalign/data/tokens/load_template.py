"""Chat templates by name: the tokenizer's own, one that is built in, or a .jinja file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dsalign.data.tokens.chat_templates import BUILT_IN
from dsalign.data.tokens.templates import Template

NAMES = tuple(BUILT_IN)


def load_template(
    tokenizer: PreTrainedTokenizerBase, name: str | None, end_ids: Iterable[int]
) -> tuple[Template, str | None]:
    """(the template, a line of warning or None).

    name: one of NAMES, the path of a .jinja file, or None = the tokenizer's own, or ChatML with a warning where it has
    none. end_ids: those of the model's generation_config.eos_token_id; the tokenizer's EOS counts as well, and so does
    a built-in template's end of turn where it is one id of the vocabulary.
    Raises ValueError for an unknown name, a file that is no template, or a tokenizer without any end token.
    """
    ends = set(end_ids)
    eos = tokenizer.eos_token_id
    if eos is not None:
        ends.add(eos)
    warning = None
    if name is None and tokenizer.chat_template:
        return _checked(Template("the tokenizer's own", tokenizer, None, frozenset(ends))), None
    if name is None:
        warning = (
            "the tokenizer has no chat template: conversations are written as ChatML; "
            f"name a template with --template ({', '.join(NAMES)}, or a .jinja file)"
        )
    if (name or "chatml") in BUILT_IN:
        return _checked(_built_in(name or "chatml", tokenizer, ends)), warning
    return _checked(Template(str(name), tokenizer, _jinja(str(name)), frozenset(ends))), None


def _built_in(name: str, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> Template:
    """The built-in template of this name. It ends turns with its own token where that is one id, else with EOS."""
    text, turn_end = BUILT_IN[name]
    ids = [] if turn_end is None else tokenizer(turn_end, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return Template(name, tokenizer, text.replace("TURN_END", repr(turn_end)), frozenset(ends | {ids[0]}))
    # Without EOS either the template would write no turn end at all.
    known = ends if tokenizer.eos_token_id is not None or "TURN_END" not in text else set()
    # Rows for the template plain were rendered before, so what spells a special token in them is that token.
    written = text.replace("TURN_END", "eos_token")
    return Template(name, tokenizer, written, frozenset(known), special_in_text=name == "plain")


def _jinja(name: str) -> str:
    path = Path(name).expanduser()
    if path.suffix != ".jinja" or not path.is_file():
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {near[0]!r}?" if near else "check the path"
        if path.is_file():
            hint = f"if it is a template, call it {path.with_suffix('.jinja').name}"
        raise ValueError(f"template: expected {', '.join(NAMES)} or a .jinja file that exists, got {name!r}; {hint}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"template {name!r}: expected UTF-8 text, got {error}; save the file as UTF-8") from error


def _checked(template: Template) -> Template:
    if not template.end_ids:
        raise ValueError(
            "tokenizer: expected an end token, got none: no eos_token, and no eos_token_id that the template writes; "
            "set tokenizer.eos_token, or eos_token_id in the generation config"
        )
    template._render_all.check_syntax()
    return template
