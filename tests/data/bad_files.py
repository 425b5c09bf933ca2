"""Bad data files of every kind, each with what the answer to it must name: the place, the true cause, what to do.

Every row of a file has the fault, unless its name says otherwise: then no good row points at the cause.
"""

from __future__ import annotations

import gzip
import io
import json
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

USER, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}
PAIR, LABEL = {"prompt": "q", "chosen": "c", "rejected": "r"}, {"prompt": "q", "completion": "c", "label": True}
DEMO, TALK = {"prompt": "q", "completion": "c"}, {"messages": [USER, SAID]}


class Bad(NamedTuple):
    """algo: of the run. name: of the file. content: its bytes. words: what the answer must say, the place first."""

    algo: str
    name: str
    content: bytes
    words: tuple[str, ...]


def jsonl(*rows: Any) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(*rows: Any) -> bytes:
    """Rows as a JSON array over several lines."""
    return json.dumps(list(rows), indent=1).encode()


def table(*rows: Any, first: int | None = None) -> bytes:
    """Rows as Parquet; first: how many of them, None = all."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)).slice(0, first), file)
    return file.getvalue()


def sft(messages: Any, *words: str, **more: Any) -> Bad:
    """Two rows with these messages."""
    row = {"messages": messages, **more}
    return Bad("sft", "a.jsonl", jsonl(row, row), ("a.jsonl:1: ", *words))


def rows(algo: str, row: Any, *words: str) -> Bad:
    """Two lines of JSON, both this row."""
    return Bad(algo, "a.jsonl", jsonl(row, row), ("a.jsonl:1: ", *words))


def text(algo: str, name: str, content: str, *words: str) -> Bad:
    """A file with this text."""
    return Bad(algo, name, content.encode(), words)


HTML = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head>\n<body>401</body></html>\n"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
PACKED = gzip.compress(jsonl(*[DEMO] * 99))
WIDE = jsonl(DEMO, DEMO).decode()

MISSPELT = {
    "a misspelt answer": rows("dpo", {"prompt": "q", "choosen": "c", "rejected": "r"}, "--columns choosen=chosen"),
    "in CSV": text("sft", "a.csv", "prompt,completon\nq,c\nq,c\n", "a.csv:2: ", "--columns completon=completion"),
    "in TSV": text("dpo", "a.tsv", "promt\tchosen\trejected\nq\tc\tr\n", "a.tsv:2: ", "--columns promt=prompt"),
    "in Parquet": Bad(
        "sft", "a.parquet", table({"instuction": "q", "output": "c"}), ("a.parquet:row 1: ", "instuction=instruction")
    ),
    "in an array": Bad("sft", "a.json", array({"prompt": "q", "completio": "c"}), ("a.json:2: ", "completio=compl")),
    "packed": Bad("sft", "a.jsonl.gz", gzip.compress(jsonl({"mesages": 1})), ("a.jsonl.gz:1: ", "mesages=messages")),
    "a label": rows("kto", {"prompt": "q", "completion": "c", "lable": True}, "--columns lable=label"),
    "a question for rollouts": rows("ppo", {"promt": "q"}, "--columns promt=prompt"),
    "a conversation": rows("sft", {"conversation": [USER, SAID]}, "--columns conversation=messages"),
    "capitals": rows("sft", {"Prompt": "q", "Completion": "c"}, "--columns Prompt=prompt Completion=completion"),
    "other names": rows("dpo", {"question": "q", "chosen": "c", "rejected": "r"}, "--columns question=prompt"),
    "other names of all": rows("sft", {"question": "q", "answer": "c"}, "--columns question=prompt answer=completion"),
    "blanks behind commas": text(
        "dpo", "a.csv", "prompt, chosen, rejected\nq, c, r\n", "a.csv:1: ", "' chosen'", "blank"
    ),
    "no header": text("sft", "a.csv", "What is one?,two\nWhy?,so\n", "a.csv:2: ", "'What is one?'", "the first line"),
    "columns in the place of rows": text(
        "sft", "a.json", '{"prompt": ["q", "p"], "completion": ["c", "d"]}', "a.json:1: ", "prompt", "one object a row"
    ),
    "columns as pandas writes them": text(
        "sft", "a.json", '{"prompt": {"0": "q"}, "completion": {"0": "c"}}', "a.json:1: ", "prompt", "one object a row"
    ),
}
OTHER_ROWS = {
    "pairs to sft": rows("sft", PAIR, "--algo dpo"),
    "pairs to kto": rows("kto", PAIR, "--algo dpo"),
    "whole pairs to sft": rows("sft", {"chosen": [USER, SAID], "rejected": [USER, SAID]}, "--algo dpo"),
    "labels to dpo": rows("dpo", LABEL, "--algo kto"),
    "labels to orpo": rows("orpo", {"messages": [USER, SAID], "label": True}, "--algo kto"),
    "labels to sft": rows("sft", LABEL, "column 'label'", "--algo kto"),
    "answers to dpo": rows("dpo", DEMO, "--algo sft"),
    "answers to kto": rows("kto", TALK, "--algo sft"),
    "questions to dpo": rows("dpo", {"prompt": "q"}, "--algo ppo"),
    "questions to sft": rows("sft", {"prompt": "q"}, "--algo ppo"),
    "ShareGPT to rm": rows("rm", {"conversations": [{"from": "human", "value": "q"}]}, "--algo"),
    "alpaca to simpo": rows("simpo", {"instruction": "q", "input": "", "output": "c"}, "--algo sft"),
}
WRONG_VALUES = {
    "a number for a question": rows("dpo", PAIR | {"prompt": 3}, "column 'prompt'", "expected text", "got 3"),
    "a number for an answer": rows("dpo", PAIR | {"rejected": 1.5}, "column 'rejected'", "expected text", "got 1.5"),
    "null": rows("sft", DEMO | {"completion": None}, "(null: completion)"),
    "null in Parquet": Bad("dpo", "a.parquet", table(PAIR | {"chosen": None}), ("a.parquet:row 1: ", "(null: chosen)")),
    "null label": rows("kto", LABEL | {"label": None}, "(null: label)"),
    "label as text": rows("kto", LABEL | {"label": "true"}, "column 'label'", "without quotes"),
    "label yes in CSV": text(
        "kto", "a.csv", "prompt,completion,label\nq,c,yes\n", "a.csv:2: ", "column 'label'", "true or false", "'yes'"
    ),
    "label 2": rows("kto", LABEL | {"label": 2}, "column 'label'", "got 2"),
    "label -1": rows("kto", LABEL | {"label": -1}, "column 'label'", "got -1"),
    "a margin of 400 digits": rows("dpo", PAIR | {"margin": 10**400}, "column 'margin'", "a finite number"),
    "margin as text": rows("dpo", PAIR | {"margin": "0.5"}, "column 'margin'", "a finite number", "'0.5'"),
    "weight in between": sft([USER, SAID | {"weight": 0.5}], "'messages[1].weight'", "0.5"),
    "bytes in Parquet": Bad(
        "sft", "a.parquet", table(DEMO | {"prompt": b"q"}), ("a.parquet:row 1: ", "column 'prompt'", "b'q'")
    ),
    "NUL": rows("sft", DEMO | {"completion": "a\0b"}, "column 'completion'", "NUL"),
    "half of a pair": text(
        "sft", "a.jsonl", '{"prompt": "\\ud83d", "completion": "c"}\n', "a.jsonl:1: ", "'prompt'", "surrogate"
    ),
    "NaN": text("dpo", "a.jsonl", json.dumps(PAIR | {"margin": float("nan")}), "a.jsonl:1: ", "got NaN"),
    "a list of texts": rows("sft", DEMO | {"completion": ["c", "d"]}, "'completion[0]'", "got 'c'", "not in a list"),
    "an answer without a role": rows(
        "sft", DEMO | {"completion": {"text": "c"}}, "'completion[0]'", "got {'text': 'c'}", '"role"'
    ),
    "history of texts": rows("sft", {"query": "q", "response": "c", "history": ["a"]}, "'history[0]'", "a pair"),
    "tools in words": sft([USER, SAID], "column 'tools'", "as JSON text", tools="hammer"),
    "a picture": sft([USER, SAID], "column 'images'", "trains on text", images=["cat.png"]),
    "a picture in a part": sft(
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, SAID], "content[0]", "image_url"
    ),
    "two system prompts": sft(
        [{"role": "system", "content": "s"}, USER, SAID], "column 'system'", "one system prompt", system="t"
    ),
    "a score for each answer": rows("ppo", {"prompt": ["q"]}, "'prompt[0]'", "a message"),
}
CONVERSATIONS = {
    "no list": sft("q", "column 'messages'", "a list of messages", "'q'"),
    "JSON as text": sft(json.dumps([USER, SAID]), "column 'messages'", "a list of messages", "JSON as text"),
    "a list in a list": sft([[USER, SAID]], "'messages[0]'", "a message"),
    "empty": sft([], "column 'messages'", "a list of messages", "got []"),
    "a critic": sft([USER, {"role": "critic", "content": "c"}], "'messages[1].role'", "'critic'"),
    "capitals of a role": sft([{"role": "User", "content": "q"}, SAID], "'messages[0].role'", "'User'; write 'user'"),
    "a thought as a part": sft(
        [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]}],
        "'messages[1].content[0]'", "got 'thinking'", "goes into the message's reasoning_content",
    ),
    "no role": sft([{"content": "q"}, SAID], "'messages[0]'", "a message", '"role"'),
    "no content": sft([USER, {"role": "assistant"}], "'messages[1].content'", "expected text"),
    "null content": sft([USER, {"role": "assistant", "content": None}], "'messages[1].content'", "expected text"),
    "content of a number": sft([USER, {"role": "assistant", "content": 4}], "'messages[1].content'", "got 4"),
    "asked twice": sft([USER, USER, SAID], "'messages[1].role'", "expected 'assistant'"),
    "answered first": sft([SAID, USER, SAID], "'messages[0].role'", "'system' or 'user'"),
    "system in the middle": sft([USER, SAID, {"role": "system", "content": "s"}], "'messages[2].role'", "'system'"),
    "no answer at the end": sft([USER, SAID, USER], "column 'messages'", "ends with a turn of the assistant"),
    "system alone": sft([{"role": "system", "content": "s"}], "column 'messages'", "ends with a turn of the assistant"),
    "a tool that nobody called": sft([USER, {"role": "tool", "content": "4"}, SAID], "'messages[1].role'", "'tool'"),
    "thoughts of the user": sft([USER | {"reasoning_content": "hm"}, SAID], "reasoning_content", "assistant thinks"),
    "a call without a name": sft(
        [USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}], "tool_calls[0]", "a function with a name"
    ),
    "ShareGPT of a bot": rows(
        "sft", {"conversations": [{"from": "human", "value": "q"}, {"from": "bot", "value": "c"}]},
        "'conversations[1].from'", "'bot'",
    ),
    "ShareGPT without a value": rows(
        "sft", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]}, "'conversations[1].value'"
    ),
    "ends with an answer": rows("ppo", {"prompt": [USER, SAID]}, "column 'prompt'", "ends with a turn of the user"),
    "pairs of other questions": rows(
        "dpo", {"chosen": [USER, SAID], "rejected": [USER | {"content": "p"}, SAID]}, "column 'rejected'", "turn 0"
    ),
    "pairs of other lengths": rows(
        "dpo", {"chosen": [USER, SAID, USER, SAID], "rejected": [USER, SAID]}, "column 'rejected'", "turn 1"
    ),
    "pairs without a question": rows("dpo", {"chosen": "c", "rejected": "r"}, "column 'chosen'", "a column prompt"),
    "an answer to another question": rows(
        "dpo", {"prompt": [USER], "chosen": [USER | {"content": "p"}, SAID], "rejected": [SAID]}, "column 'chosen'"
    ),
}  # fmt: skip
BROKEN = {
    "empty": text("sft", "a.jsonl", "", "a.jsonl: ", "at least one row", "empty file"),
    "blank": text("sft", "a.json", " \n\n", "a.json: ", "at least one row"),
    "an empty array": text("sft", "a.json", "[]\n", "a.json: ", "at least one row", "empty list"),
    "only a header": text("sft", "a.csv", "prompt,completion\n", "a.csv: ", "at least one row", "header"),
    "Parquet without rows": Bad("sft", "a.parquet", table(DEMO, first=0), ("a.parquet: ", "at least one row")),
    "cut off gz": Bad("sft", "a.jsonl.gz", PACKED[:-20], ("a.jsonl.gz: ", "a whole .gz file", "pack it again")),
    "plain text called gz": Bad("sft", "a.jsonl.gz", jsonl(DEMO), ("a.jsonl.gz: ", ".gz", "call it a.jsonl")),
    "gz without its name": Bad("sft", "a.jsonl", PACKED, ("a.jsonl: ", "gzip", "call it a.jsonl.gz")),
    "Parquet called jsonl": Bad("sft", "a.jsonl", table(DEMO), ("a.jsonl: ", "Parquet", "call it a.parquet")),
    "Parquet called json": Bad("sft", "a.json", table(DEMO), ("a.json: ", "Parquet", "call it a.parquet")),
    "Parquet called csv": Bad("sft", "a.csv", table(DEMO), ("a.csv: ", "Parquet", "call it a.parquet")),
    "JSON called parquet": Bad("sft", "a.parquet", jsonl(DEMO), ("a.parquet", "got JSON", "call it a.jsonl")),
    "cut off Parquet": Bad("sft", "a.parquet", table(DEMO)[:-30], ("a.parquet", "Parquet", "again")),
    "Parquet with a broken page": Bad(
        "sft", "a.parquet", table(DEMO).replace(b"\x15\x04\x15", b"\xff\xff\xff", 1), ("a.parquet", "expected Parquet")
    ),
    "gz with a broken block": Bad(
        "sft", "a.jsonl.gz", PACKED[:10] + b"\xff" + PACKED[11:], ("a.jsonl.gz: ", "a whole .gz file", "pack it")
    ),
    "a zip": Bad("sft", "a.jsonl", b"PK\x03\x04" + bytes(60), ("a.jsonl: ", "zip", "unpack it")),
    "another ending": text("sft", "a.txt", WIDE, "a.txt", "a name that ends in", ".jsonl"),
    "an Excel sheet": Bad("sft", "a.xlsx", b"PK\x03\x04", ("a.xlsx", "a name that ends in")),
    "UTF-16": Bad("sft", "a.jsonl", WIDE.encode("utf-16"), ("a.jsonl: ", "UTF-16", "save the file as UTF-8")),
    "UTF-16 without a mark": Bad("sft", "a.jsonl", WIDE.encode("utf-16-le"), ("a.jsonl: ", "UTF-16", "as UTF-8")),
    "UTF-16, packed": Bad("sft", "a.jsonl.gz", gzip.compress(WIDE.encode("utf-16")), ("a.jsonl.gz: ", "UTF-16")),
    "UTF-16 CSV": Bad("sft", "a.csv", "prompt,completion\nq,c\n".encode("utf-16"), ("a.csv: ", "UTF-16")),
    "UTF-32": Bad("sft", "a.json", WIDE.encode("utf-32"), ("a.json: ", "UTF-32", "save the file as UTF-8")),
    "Latin-1": Bad(
        "sft",
        "a.jsonl",
        jsonl(DEMO | {"completion": "\u00e9t\u00e9"}).decode().encode("latin-1"),
        ("a.jsonl:1: ", "expected UTF-8", "0xe9"),
    ),
    "GBK CSV": Bad(
        "sft", "a.csv", "prompt,completion\n\u4f60\u597d,c\n".encode("gbk"), ("a.csv:2: ", "expected UTF-8", "0xc4")
    ),
    "a page": text("sft", "a.json", HTML, "a.json", "HTML", "download"),
    "a page as lines": text("sft", "a.jsonl", HTML, "a.jsonl", "HTML", "download"),
    "a page as CSV": text("sft", "a.csv", HTML, "a.csv", "HTML", "download"),
    "a page as Parquet": text("sft", "a.parquet", HTML, "a.parquet", "HTML", "download"),
    "XML of an error": text("sft", "a.jsonl", '<?xml version="1.0"?><Error/>', "a.jsonl", "XML", "download"),
    "a pointer": text("sft", "a.jsonl", POINTER, "a.jsonl", "Git LFS", "git lfs pull"),
    "a pointer as JSON": text("sft", "a.json", POINTER, "a.json", "Git LFS", "git lfs pull"),
    "a pointer as CSV": text("sft", "a.csv", POINTER, "a.csv", "Git LFS", "git lfs pull"),
    "a pointer as Parquet": text("sft", "a.parquet", POINTER, "a.parquet", "Git LFS", "git lfs pull"),
    "a reply of a server": text(
        "sft", "a.json", '{"error": "Repository not found"}', "a.json:1: ", "got error", "not found"
    ),
    "cut off": text("sft", "a.jsonl", WIDE[:-9], "a.jsonl:2: ", "expected JSON", "cut off"),
    "a cut off array": text("sft", "a.json", array(DEMO, DEMO).decode()[:-9], "a.json:", "expected JSON"),
    "Python's quotes": text("sft", "a.jsonl", f"{DEMO}\n", "a.jsonl:1: ", "double quotes", "Python"),
    "Python's words": text("kto", "a.jsonl", WIDE[:11] + "True}\n", "a.jsonl:1: ", "got ", "Python"),
    "a comment": text("sft", "a.jsonl", "// rows\n" + WIDE, "a.jsonl:1: ", "expected JSON", "// rows"),
    "a row over lines": text("sft", "a.jsonl", json.dumps(DEMO, indent=1), "a.jsonl:1: ", "one complete JSON object"),
    "two rows on a line": text("sft", "a.jsonl", WIDE.replace("\n", " "), "a.jsonl:1: ", "one JSON object on a line"),
    "commas behind lines": text("sft", "a.jsonl", WIDE.replace("\n", ",\n"), "a.jsonl:1: ", "one JSON object", "','"),
    "a comma behind the last row": text("sft", "a.json", f"[{json.dumps(DEMO)},]", "a.json:1: ", "remove the ','"),
    "rows as text": rows("sft", json.dumps(DEMO), "a row as a JSON object", "got str"),
    "rows as lists": rows("sft", ["q", "c"], "a row as a JSON object", "got list"),
    "rows as numbers": Bad("sft", "a.json", b"[1, 2]", ("a.json:1: ", "a row as a JSON object", "got int 1")),
    "a key twice": text("sft", "a.jsonl", '{"prompt": "q", "prompt": "p"}\n', "a.jsonl:1: ", "'prompt' twice"),
    "a column twice": text("sft", "a.csv", "prompt,prompt\nq,p\n", "a.csv:1: ", "each column name once", "rename"),
    "a quote that nobody closes": text(
        "sft", "a.csv", 'prompt,completion\n"q,c\nq,c\n', "a.csv:2: ", "quote", "never closed"
    ),
    "a quote within a cell": text("sft", "a.csv", 'prompt,completion\n"q" p,c\n', "a.csv:2: ", "expected CSV", "quote"),
    "a cell too many": text("sft", "a.csv", "prompt,completion\nq, p,c\n", "a.csv:2: ", "expected 2 cells", "got 3"),
    "a cell too few": text("sft", "a.tsv", "prompt\tcompletion\nq\n", "a.tsv:2: ", "expected 2 cells", "got 1"),
    "semicolons": text("sft", "a.csv", "prompt;completion\nq;c\n", "a.csv:1: ", "expected ','", "';'"),
    "tabs called CSV": text("sft", "a.csv", "prompt\tcompletion\nq\tc\n", "a.csv:1: ", "call it .tsv"),
    "commas called TSV": text("sft", "a.tsv", "prompt,completion\nq,c\n", "a.tsv:1: ", "call it .csv"),
    "conversations in CSV": text("sft", "a.csv", 'messages\n"[]"\n', "a.csv:2: ", "column 'messages'", "use .jsonl"),
    "nested without end": text("sft", "a.jsonl", '{"a": ' + "[" * 9999, "a.jsonl:1: ", "at most 100 deep"),
}
MIXED = {  # a bad row or two behind good ones
    "labels among pairs": Bad("dpo", "a.jsonl", jsonl(PAIR, LABEL), ("a.jsonl:2: ", "--algo kto")),
    "pairs among labels": Bad("kto", "a.json", array(LABEL, LABEL, PAIR), ("a.json:12: ", "--algo dpo")),
    "no answer": Bad("sft", "a.jsonl", jsonl(DEMO, {"prompt": "q"}, DEMO), ("a.jsonl:2: ", "no answer", "--algo ppo")),
    "no rejected answer": Bad(
        "dpo", "a.jsonl", jsonl(PAIR, PAIR | {"rejected": None}), ("a.jsonl:2: ", "null: reject")
    ),
    "two layouts in Parquet": Bad("dpo", "a.parquet", table(PAIR, DEMO), ("a.parquet:row 2: ", "null: chosen, reject")),
    "the first cause of two": Bad(
        "sft", "a.jsonl", jsonl({"messages": [USER]}, {"prompt": 3, "completion": "c"}), ("a.jsonl:1: ", "'messages'")
    ),
}
LOST = {  # read, and of no use: what `data check` and the start of a run say of them
    "too long": Bad("sft", "a.jsonl", jsonl(DEMO | {"completion": "c" * 999}), ("max_length = 200", "--max_length")),
    "same answers": Bad("dpo", "a.jsonl", jsonl(PAIR | {"rejected": "c"}), ("a.jsonl:1", "identical pairs")),
    "no answers": Bad("sft", "a.jsonl", jsonl(DEMO | {"completion": ""}), ("a.jsonl:1", "empty answers")),
    "blank answers": Bad("sft", "a.jsonl", jsonl(DEMO | {"completion": " \n "}), ("1 rows", "without any text")),
    "no questions": Bad("sft", "a.jsonl", jsonl(DEMO | {"prompt": " "}), ("1 rows", "without any text")),
    "twice": Bad("sft", "a.jsonl", jsonl(DEMO, DEMO), ("a.jsonl:2", "duplicates")),
    "spelled tokens": Bad("sft", "a.jsonl", jsonl(DEMO | {"completion": "a<|im_end|>b"}), ("spell special tokens",)),
    "columns that nothing reads": Bad("sft", "a.jsonl", jsonl(DEMO | {"score": 1}), ("not read", "score (1 rows)")),
}
EVERY = {
    f"{kind}: {name}": bad
    for kind, files in (
        ("misspelt", MISSPELT), ("rows of another kind", OTHER_ROWS), ("values", WRONG_VALUES),
        ("conversations", CONVERSATIONS), ("files", BROKEN), ("mixed", MIXED),
    )
    for name, bad in files.items()
}  # fmt: skip
