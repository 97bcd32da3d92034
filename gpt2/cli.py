"""From command lines and YAML files to config dataclasses, and from errors to one line.

Order: defaults < preset < YAML file < command line. A YAML file is flat: one `key: value` a line,
the fields of a dataclass of gpt2.config; an unknown key is an error.
"""

import contextlib
import dataclasses
import errno
import io
import os
import re
import signal
import sys
import types
import typing
from pathlib import Path
from typing import Literal

from gpt2.config import REMOVED_OPTIONS, spell_sources, suggest

# Control characters but tab and newline, and what reverses the direction of a line.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COMMANDS = {"pretrain": "train", "sft": "sft", "dpo": "dpo"}  # by the kind of a YAML file
RECIPES = Path(__file__).parent / "configs"


_SWITCH = {word: "on" for word in ("true", "yes", "on")}
_SWITCH |= {word: "off" for word in ("false", "no", "off")}
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def parse(cls, description: str, argv: list[str] | None = None):
    """A config dataclass from a command line: [FIRST] [FILE.yaml] [--option value ...].

    FIRST is the value of the field that cls names as POSITIONAL, or of its first field. The recipe
    of a training run may stand anywhere, a YAML file for another script first.
    Raises ValueError for a bad file, option or value; --help prints what there is and exits.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    recipe, options = _read_words(cls, [word for word in argv if word not in ("-h", "--help")])
    values = read_yaml(cls, recipe) if recipe else {}
    if "-h" in argv or "--help" in argv:
        import tyro

        # tyro joins lines that begin with a letter; commands are to stay apart.
        description = re.sub(r"\n+ {4}", "\n$ ", description)
        default, config = cls(**values) if values else None, (tyro.conf.FlagConversionOff,)
        tyro.cli(cls, args=["--help"], default=default, description=description, config=config)
    values |= coerce(cls, options)
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"--{field.name} is missing; --help says what it is")
    return cls(**values)


def _read_words(cls, argv: list[str]) -> tuple[str, dict]:
    """The recipe among the words of a command line, "" without one, and its options as text."""
    fields = dataclasses.fields(cls)
    many = {f.name for f in fields if typing.get_origin(f.type) is tuple}
    alone = {f.name: "True" for f in fields if f.type in (bool, bool | None)}
    alone |= {f.name: "on" for f in fields if "on" in typing.get_args(f.type)}
    recipes, found, name = [], {}, getattr(cls, "POSITIONAL", fields[0].name)
    for i, word in enumerate(argv):
        is_full = name not in found or bool(found[name]) or name in alone
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif word.endswith((".yaml", ".yml")) and (is_full and hasattr(cls, "KIND") or i == 0):
            recipes.append(word)
        elif is_full and name not in many and re.match("-[a-zA-Z]", word):
            raise ValueError(f"unknown option {word}: options begin with --; --help lists them")
        else:
            found.setdefault(name, []).append(word)
    if len(recipes) > 1:
        raise ValueError(f"{' and '.join(recipes)}: give one recipe")
    for name, words in found.items():
        if name not in many and len(words) > 1:
            raise ValueError(f"--{name} takes one value, got {' '.join(words)}")
        if name not in many:
            found[name] = words[0] if words else alone.get(name)
    return "".join(recipes), found


def read_yaml(cls, path: str | Path) -> dict:
    """The values in a YAML file, as the types of cls's fields.

    Raises OSError (missing) and ValueError (unknown key with the nearest known one, wrong type, a
    file of another kind of run).
    """
    values = _load_yaml(path)
    kind = values.pop("kind", None)
    if kind is not None and kind != getattr(cls, "KIND", None):
        command = COMMANDS.get(str(kind), "COMMAND")
        raise ValueError(f"{path}: its kind is {kind!r}, for `gpt2-triton {command}`")
    return coerce(cls, values, str(path))


def read_config(path: str | Path, *classes):
    """The config in a YAML file, as the class of its kind; else the first that has its keys.

    Raises OSError, and ValueError for what is wrong with it.
    """
    kind = _load_yaml(path).get("kind")
    named = [cls for cls in classes if cls.KIND == kind]
    first = None
    for cls in named or classes:
        try:
            return cls(**read_yaml(cls, path))
        except ValueError as error:
            first = first or error
    raise first


def to_yaml(config) -> str:
    """A config as read_yaml takes it."""
    import yaml

    values = {"kind": config.KIND, **dataclasses.asdict(config)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _load_yaml(path: str | Path) -> dict:
    """The content of a file, or of the recipe in the package that is meant: [configs/]NAME.yaml.

    Its values are words, as on a command line: YAML reads 010 as 8, 190:20:30 as 685230, on as a
    truth value. A key that stands twice is an error: YAML takes the last.
    """
    import yaml

    class Words(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.YAMLError(f"{twice[0]!r} stands twice: leave one out")
            return super().construct_mapping(node, deep)

    for kind in ("int", "float", "bool", "timestamp"):
        Words.add_constructor(f"tag:yaml.org,2002:{kind}", Words.construct_yaml_str)

    path, recipe = Path(path), RECIPES / Path(path).name
    if path.parent.name in ("", "configs") and recipe.exists() and not path.exists():
        path = recipe
    if path.exists() and not path.is_file():  # reading from a pipe or a device may never end
        raise OSError(errno.EINVAL, "not a file: name the YAML file of a recipe", str(path))
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Words)
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {str(error).replace(chr(10), ' ')}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    return values


def coerce(cls, values: dict, source: str = "") -> dict:
    """values with each one as the type of its field; source names them in errors, "" means the
    command line."""
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    result, start = {}, f"{source}: " if source else "--"
    for key, value in values.items():
        if key not in known and key in REMOVED_OPTIONS:
            reason = f"is no option any more, leave it out: {REMOVED_OPTIONS[key]}"
            raise ValueError(f"{start}{key} {reason}")
        if key not in known and source:
            raise ValueError(f"{source}: unknown key {key!r}: {suggest(str(key), known)}")
        if key not in known:
            others = suggest(f"--{key}", [f"--{name}" for name in known])
            raise ValueError(f"unknown option --{key}: {others}")
        if key == "data" and isinstance(value, list):
            value = spell_sources(value, f"{source}: data")
        if value is None and not source:
            raise ValueError(f"--{key} needs a value")
        result[key] = _coerce_value(known[key], value, f"{start}{key}")
    return result


def _coerce_value(hint, value, where: str):
    """A value as its field has it, from YAML or from a word of a command line."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        value = _SWITCH.get(str(value).lower(), value) if "on" in options else value
        if value not in options:
            raise ValueError(f"{where}: must be one of {', '.join(options)}, got {value!r}")
        return value
    words = ""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if type(None) in options and value in (None, "None"):
            return None
        known = [w for t in options if typing.get_origin(t) is Literal for w in typing.get_args(t)]
        if value in known:
            return value
        hint = next((t for t in options if isinstance(t, type) and t is not type(None)), None)
        if hint is None:
            return _coerce_value(options[0], value, where)
        words = "".join(f"{word} or " for word in known)
    if typing.get_origin(hint) is tuple:  # of any length, all of one type
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: must be a list, got {value!r}")
        return tuple(_coerce_value(options[0], v, f"{where} {i}") for i, v in enumerate(value, 1))
    if hint in (int, float) and type(value) in (int, float, str):
        with contextlib.suppress(ValueError, OverflowError):  # YAML reads 1e3 as text
            number = float(value)
            if hint is float:
                return number
            if number.is_integer():
                return int(value if str(value).isdigit() else number)
    if hint is bool and str(value).lower() in _SWITCH:
        return _SWITCH[str(value).lower()] == "on"
    if type(value) is not hint:
        raise ValueError(f"{where}: must be {words}{KINDS[hint]}, got {value!r}")
    return value


def run_script(main) -> None:
    """Runs a script's main; what the user can mend ends it with one line on stderr and status 1.

    `python -X dev script.py` shows where such an error came from.
    """
    rank = os.environ.get("RANK")
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character is no reason
        if isinstance(stream, io.TextIOWrapper):  # to stop; None where there is no stream
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:  # of `script | head`: nobody reads on
        SafeOutput(sys.stdout).drop()
        sys.exit(141)
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        text = _in_words(error)
        if sys.flags.dev_mode or text is None:
            raise
        complain(f"error{f' (rank {rank})' if rank else ''}: {text}")
        if rank:  # at once, without waiting for other ranks: torchrun then ends them
            with contextlib.suppress(OSError):
                print(end="", flush=True)
            os._exit(1)
        sys.exit(1)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)


def _in_words(error: Exception) -> str | None:
    """An error that the user can mend; None for one that is ours."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError | RuntimeError) and not isinstance(error, RecursionError):
        # torch has a class for a GPU's memory only.
        if not isinstance(error, MemoryError) and not re.search("memory|Storage size", text):
            return None
        return f"out of memory ({text[:200].strip()}): ask for less at a time"
    return text


@contextlib.contextmanager
def starting():
    """While modules are imported: Ctrl-C ends the program at once, with one line. Raised as an
    exception there it would be a traceback, or be swallowed by whoever runs at that moment."""

    def leave(_number, _frame):
        complain("interrupted")
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def printable(text: str) -> str:
    """text for a terminal or a page: what would steer it stands there escaped, as in \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """A line on stdout of a program that goes on, also where nobody reads it any more."""
    print(text, file=SafeOutput(sys.stdout), flush=True)


def complain(text: str) -> None:
    """A line on stderr, whatever has become of that."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class SafeOutput:
    """A text stream for people whose writes never raise.

    What cannot be written is dropped: for good where nobody reads on (`| head`, a closed terminal).
    Characters that the encoding lacks are spelled out, and with escape all that are not printable,
    since names and generated text may hold sequences that a terminal obeys.
    """

    def __init__(self, stream, *, escape: bool = True):
        stream = stream.stream if isinstance(stream, SafeOutput) else stream
        self.stream = io.StringIO() if stream is None else stream  # None: started without one
        self.escape = escape

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        shown = printable(text) if self.escape else text
        self._try(self.stream.write, shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call, *args) -> None:
        try:
            call(*args)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            if getattr(error, "errno", None) in (errno.EPIPE, errno.EIO):
                self.drop()

    def drop(self) -> None:
        """From now on all that is written goes nowhere, by whomever, and what is in the buffer."""
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)
