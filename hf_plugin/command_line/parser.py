"""A parser of flags that knows which were set, reads them from files too, and answers mistakes with one sentence."""

import argparse
import dataclasses
import difflib
import enum
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from head_pruning import HeadPruningError
from head_pruning.errors import one_line
from head_pruning.files import parse_json
from head_pruning.yaml_text import parse_yaml

FILES = (".json", ".yaml", ".yml")


def flag_group(title: str, fields: Iterable[dataclasses.Field]) -> type:
    """A dataclass of the fields, whose flags stand under ``title`` in the help. The fields stay as they are."""
    copies = []
    for old in fields:
        if old.default_factory is not dataclasses.MISSING:
            new = dataclasses.field(default_factory=old.default_factory, metadata=dict(old.metadata))
        else:
            new = dataclasses.field(default=old.default, metadata=dict(old.metadata))
        copies.append((old.name, old.type, new))
    return dataclasses.make_dataclass("Flags", copies, namespace={"_argument_group_name": title}, kw_only=True)


class FlagParser(HfArgumentParser):
    """HfArgumentParser whose result holds only the flags that were set.

    Args:
        script: name of the script, without ``.py``.
        groups: dataclasses with ``_argument_group_name``, see :func:`flag_group`.
        description: what the script does.
        needs: flags that are required although their field has a default.
        defaults: what the help shows as a flag's default where it is not the field's.
    """

    def __init__(
        self,
        script: str,
        groups: Sequence[type],
        description: str,
        needs: Sequence[str] = (),
        defaults: Optional[Mapping[str, Any]] = None,
    ) -> None:
        super().__init__(
            groups,
            prog=f"{script}.py",
            usage=f"{script}.py [arguments.json or .yaml] [--flag value ...]",
            description=description,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
            allow_abbrev=False,
        )
        #: Flags that another script has, with a cure that is better than the nearest flag; ``{}``: the flag's value.
        self.elsewhere: dict[str, str] = {}
        self.required = [action.dest for action in self._actions if action.required or action.dest in needs]
        for action in self._actions:
            if not isinstance(action, argparse._HelpAction):
                self._prepare(action, defaults or {})

    def action(self, name: str) -> Optional[argparse.Action]:
        """What handles ``--name``; None when there is no such flag."""
        return self._option_string_actions.get(f"--{name}")

    def known(self, name: str) -> argparse.Action:
        """What handles ``--name``, which is a flag."""
        return self._option_string_actions[f"--{name}"]

    def hide(self, name: str) -> None:
        """Leave the flag ``--name`` out of the help."""
        self.known(name).help = argparse.SUPPRESS

    def drop(self, name: str) -> None:
        """Take the flag ``--name`` away."""
        action: Any = self.known(name)
        for flag in [flag for flag, found in self._option_string_actions.items() if found is action]:
            del self._option_string_actions[flag]
        action.container._remove_action(action)

    def _prepare(self, action: argparse.Action, defaults: Mapping[str, Any]) -> None:
        default = defaults.get(action.dest, action.default)
        default = default.value if isinstance(default, enum.Enum) else default
        if action.dest in self.required:
            action.help = f"{(action.help or '').rstrip('.')} (required)"
        elif action.nargs != 0 and default is not False and default not in (None, "", []):
            action.help = f"{action.help or ''} (default: {default})"
        action.required, action.default = False, argparse.SUPPRESS
        if action.type is string_to_bool:  # a flag, though its default may be None
            action.nargs, action.const, action.metavar = "?", True, "True|False"
        elif action.type in _NUMBERS:
            action.type, action.metavar = _NUMBERS[action.type]
        elif action.nargs != 0 and len(tuple(action.choices or ())) not in range(1, 7):
            action.metavar = "VALUE"
        # Dashes are read but not shown.
        action.option_strings = [flag for flag in action.option_strings if "-" not in flag[2:]]

    def parse_set(self, argv: Sequence[str]) -> dict[str, Any]:
        """The flags that were set, by name; of a file of arguments (the first word) and of the words after it.

        Raises:
            HeadPruningError: an unknown flag, a value that does not fit, a required flag that was not set, or a file
                that cannot be read.
        """
        words, given = list(argv), argparse.Namespace()
        if words and not words[0].startswith("-") and Path(words[0]).suffix.lower() in FILES:
            from_file, given = self._read(words[0])
            words[:1] = from_file
        _, rest = self.parse_known_args(words, given)
        if rest:
            raise HeadPruningError(self._unknown(rest))
        missing = [f"--{name}" for name in self.required if not hasattr(given, name)]
        if missing:
            raise HeadPruningError(f"{self.prog} needs {', '.join(missing)}; add what is missing.")
        return vars(given)

    def error(self, message: str) -> None:
        """Called by argparse. Raises HeadPruningError."""
        message = message.removeprefix("argument ")[:1000]
        raise HeadPruningError(f"{message}; {self.prog} --help lists the flags.")

    def _unknown(self, rest: Sequence[str]) -> str:
        word = next((word for word in rest if word.startswith("-")), None)
        if word is None:
            return (
                f"{rest[0]:.80} belongs to no flag; flags start with --, and a file of arguments comes first and ends "
                f"in {', '.join(FILES)}."
            )
        flag, _, value = word.partition("=")
        value = value or next(iter(rest[rest.index(word) + 1 :]), "")
        return f"{self.prog} has no flag {flag:.80}{self._nearest(flag, value)}."

    def _nearest(self, flag: str, value: Any) -> str:
        name = flag.lstrip("-").replace("-", "_")
        if name in self.elsewhere:
            return "; " + self.elsewhere[name].format(str(value or "NAME")[:80])
        shown = [action.dest for action in self._actions if action.help != argparse.SUPPRESS]
        near = difflib.get_close_matches(name, shown, n=1)
        return f" (did you mean --{near[0]}?)" if near else f"; {self.prog} --help lists the flags"

    def _read(self, path: str) -> tuple[list[str], argparse.Namespace]:
        """A file's arguments: single values as words, lists and mappings as they are."""
        words, values = [], argparse.Namespace()
        for name, value in read_mapping(path).items():
            name = str(name).removeprefix("--").replace("-", "_")
            action = self.action(name)
            if action is None or name == "help":
                raise HeadPruningError(
                    f"{path} has {name}, but {self.prog} has no flag --{name}{self._nearest(name, value)}."
                )
            several = action.nargs in ("+", "*")
            if value is None or several and value in ("", []):
                continue
            if several and isinstance(value, list):
                if any(isinstance(each, (list, dict)) for each in value):  # aliases of YAML make them huge as words
                    raise HeadPruningError(f"{name} in {path} has a list in its list; give single values.")
                words += [f"--{name}", *map(str, value)]
            elif isinstance(value, (list, dict)) and isinstance(action, argparse._StoreAction):
                if getattr(action.type, "__origin__", action.type) not in (None, str, dict, list):
                    raise HeadPruningError(f"{name} in {path} is a {type(value).__name__}; give one value.")
                setattr(values, action.dest, value)
            elif action.nargs == 0:  # --no_x
                words += [f"--{name}"] if value else []
            else:
                off = value is False and action.choices is not None and "no" in action.choices  # YAML's no
                words.append(f"--{name}={'no' if off else value}")
        return words, values


def read_mapping(path: "str | Path") -> dict[str, Any]:
    """A JSON or YAML file of names and values.

    Raises:
        HeadPruningError: there is no such file, it does not parse, or it holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = parse_json(text) if Path(path).suffix.lower() == ".json" else parse_yaml(text)
    except OSError as error:
        raise HeadPruningError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        reason = one_line(error)
        raise HeadPruningError(f"{path} does not parse ({reason}); correct it there.") from error
    if not isinstance(data, dict):
        raise HeadPruningError(f"{path} holds no names and values; write it as name: value.")
    return data


def subset(given: Mapping[str, Any], fields: Iterable[dataclasses.Field]) -> dict[str, Any]:
    """Of the flags that were set, those of the fields."""
    return {field.name: given[field.name] for field in fields if field.name in given}


def require_positive(given: Mapping[str, Any], *names: str) -> None:
    """Raise HeadPruningError if a flag of these names was set below 1."""
    for name in names:
        if given.get(name, 1) < 1:
            raise HeadPruningError(f"--{name} is {given[name]}; it must be 1 or more.")


def _number(kind: type, words: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text:.80} is not a {words}") from None

    return convert


_NUMBERS = {int: (_number(int, "whole number"), "N"), float: (_number(float, "number"), "X")}
