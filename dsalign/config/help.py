"""What `dsalign --help` prints: every option with its default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dsalign import algos
from dsalign.config import flags, options
from dsalign.config.options import REQUIRED, Option
from dsalign.config.parse import ALIASES, _algorithm_name, _merge
from dsalign.config.schema import RUN_OPTIONS, SECTIONS, one_line


def help_text(command: flags.Command) -> str:
    """All options with their defaults; those of an algorithm where `command` names one."""
    given, _ = _merge(command)
    name, _ = _algorithm_name(command, given)
    spellings = {one: [alias for alias, target in ALIASES.items() if target == one] for one in RUN_OPTIONS}

    def lines(shown: Mapping[str, Option]) -> Iterator[str]:
        for option in shown.values():
            if option.name in SECTIONS:
                yield f"\n{SECTIONS[option.name]}"
            flag = ", ".join(f"--{spelling}" for spelling in (option.name, *spellings.get(option.name, ())))
            fixed = option.default not in (REQUIRED, None, (), {})
            default = f" [{one_line(option.default)}]" if fixed else ""
            choices = f": {', '.join(option.choices())}" if option.choices() else ""
            gap = "" if len(flag) <= 31 else f"\n{'':33}"
            yield f"  {flag:<31}{gap}{option.help}{choices}{default}"

    usage = "usage: dsalign [train|rlhf|sft] --algo NAME [--model MODEL] [--dataset DATA ...] [--config FILE.yaml ...]"
    requests = "  --print_config  show each value and where it comes from\n  --version       show the version"
    own = options.of_algorithm(algos.load(name)) if name else {}
    tail = f"\n{name}\n" + "\n".join(lines(own)) if own else "\nThe options of an algorithm: dsalign --algo NAME --help"
    return "\n".join([usage, requests, f"algorithms: {', '.join(algos.names())}", *lines(RUN_OPTIONS), tail])
