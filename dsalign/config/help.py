"""The text of `dsalign --help`: every option with its default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dsalign import algos
from dsalign.config import flags
from dsalign.config.options import REQUIRED, Option
from dsalign.config.parse import ALIASES, algorithm_name, merged
from dsalign.config.schema import HEADINGS, RUN_OPTIONS, one_line, own_options


def help_text(command: flags.Command, verbs: Mapping[str, str]) -> str:
    """The text of --help: the verbs, all options of a run with their defaults, and those of the algorithm that
    `command` names. verbs: name -> one line."""
    given, _ = merged(command)
    name, _ = algorithm_name(command, given)
    spellings = {one: [alias for alias, target in ALIASES.items() if target == one][:1] for one in RUN_OPTIONS}

    def lines(shown: Mapping[str, Option]) -> Iterator[str]:
        for option in shown.values():
            if option.name in HEADINGS:
                yield f"\n{HEADINGS[option.name]}"
            flag = ", ".join(f"--{spelling}" for spelling in (option.name, *spellings.get(option.name, ())))
            fixed = option.default not in (REQUIRED, None, (), {})
            default = f" [{one_line(option.default)}]" if fixed else ""
            choices = f": {', '.join(option.choices())}" if option.choices() else ""
            gap = "" if len(flag) < 31 else f"\n{'':33}"
            yield f"  {flag:<31}{gap}{option.help}{choices}{default}"

    usage = "usage: dsalign [train|rlhf|sft] --algo NAME [--model MODEL] [--dataset DATA ...] [--config FILE.yaml ...]"
    requests = "  --print_config  show each value and where it comes from\n  --version       show the version"
    commands = ["", "commands", *(f"  {verb:<14}  {line}" for verb, line in verbs.items())]
    own = own_options(algos.load(name)) if name else {}
    tail = f"\n{name}\n" + "\n".join(lines(own)) if own else "\nThe options of an algorithm: dsalign --algo NAME --help"
    return "\n".join(
        [usage, requests, *commands, "", f"algorithms: {', '.join(algos.names())}", *lines(RUN_OPTIONS), tail]
    )
