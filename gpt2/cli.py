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
SCRIPTS = {
    "pretrain": "scripts/train_gpt2.py", "sft": "scripts/sft.py", "dpo": "scripts/dpo.py"
}  # fmt: skip


def parse(cls, description: str, argv: list[str] | None = None):
    """A config dataclass from a command line: [FILE.yaml | FIRST] [--option value ...].

    A first word that is no option is a YAML file, or else the value of the field that cls names as
    POSITIONAL, or of its first field.
    Raises ValueError for a bad file or value; exits with status 2 and a message for a bad option.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    fields = dataclasses.fields(cls)
    values = {}
    if argv and not argv[0].startswith("-"):
        first = argv.pop(0)
        if first.endswith((".yaml", ".yml")):
            values = read_yaml(cls, first)
        else:
            argv = [f"--{getattr(cls, 'POSITIONAL', fields[0].name)}", first, *argv]
    for word in argv:
        name = word.split("=")[0].removeprefix("--")
        if word.startswith("--") and name in REMOVED_OPTIONS and not hasattr(cls, name):
            raise ValueError(f"--{name} is no option any more: {REMOVED_OPTIONS[name]}")
    default = cls(**values) if values else None
    # Switches take a value like all other options: --doc_mask True. Without one True is meant.
    switches = {f"--{field.name}" for field in fields if field.type in (bool, "bool")}
    for i, (word, after) in enumerate(zip(argv, [*argv[1:], "--"], strict=False)):
        argv[i] = f"{word}=True" if word in switches and after.startswith("--") else word
    config = (tyro.conf.FlagConversionOff,)
    # tyro joins lines that begin with a letter; commands are to stay apart.
    description = re.sub(r"\n+ {4}", "\n$ ", description)
    return tyro.cli(cls, args=argv, default=default, description=description, config=config)


def read_yaml(cls, path: str | Path) -> dict:
    """The values in a YAML file, as the types of cls's fields.

    Raises OSError (missing) and ValueError (unknown key with the nearest known one, wrong type, a
    file of another kind of run).
    """
    values = _load_yaml(path)
    kind = values.pop("kind", None)
    if kind is not None and kind != getattr(cls, "KIND", None):
        raise ValueError(f"{path}: its kind is {kind!r}, for {SCRIPTS.get(kind, 'another script')}")
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


def write_yaml(config, path: str | Path) -> None:
    """Writes a config as a file that read_yaml takes."""
    import yaml

    text = yaml.safe_dump(
        {"kind": config.KIND, **dataclasses.asdict(config)}, sort_keys=False, allow_unicode=True
    )
    Path(path).write_text(text, encoding="utf-8")


def _load_yaml(path: str | Path) -> dict:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {str(error).replace(chr(10), ' ')}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    return values


def coerce(cls, values: dict, source: str) -> dict:
    """values with each one as the type of its field; source names them in errors."""
    hints = typing.get_type_hints(cls)
    result = {}
    for key, value in values.items():
        if key not in hints and key in REMOVED_OPTIONS:
            raise ValueError(
                f"{source}: {key} is no option any more, leave it out: {REMOVED_OPTIONS[key]}"
            )
        if key not in hints:
            raise ValueError(f"{source}: unknown key {key!r}: {suggest(str(key), hints)}")
        if key == "data" and isinstance(value, list):
            value = spell_sources(value, f"{source}: data")
        result[key] = _coerce_value(hints[key], value, f"{source}: {key}")
    return result


def _coerce_value(hint, value, where: str):
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        # YAML reads a bare on and off as booleans.
        value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        if value not in options:
            raise ValueError(f"{where}: must be one of {', '.join(options)}, got {value!r}")
        return value
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        words = [w for t in options if typing.get_origin(t) is Literal for w in typing.get_args(t)]
        if value in words:
            return value
        hint = next((t for t in options if isinstance(t, type) and t is not type(None)), None)
        if hint is None:
            return _coerce_value(options[0], value, where)
        if words and type(value) is not hint:
            raise ValueError(
                f"{where}: must be {', '.join(words)} or {hint.__name__}, got {value!r}"
            )
    if typing.get_origin(hint) is tuple:  # of any length, all of one type
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: must be a list, got {value!r}")
        return tuple(_coerce_value(options[0], v, f"{where} {i}") for i, v in enumerate(value, 1))
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as text
            return float(value)
        except ValueError:
            pass
    if type(value) is not hint:
        raise ValueError(f"{where}: must be {hint.__name__}, got {value!r}")
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
    except (ValueError, OSError, ImportError, RecursionError) as error:
        if sys.flags.dev_mode:
            raise
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        complain(f"error{f' (rank {rank})' if rank else ''}: {text}")
        if rank:  # at once, without waiting for other ranks: torchrun then ends them
            with contextlib.suppress(OSError):
                print(end="", flush=True)
            os._exit(1)
        sys.exit(1)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)


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
