"""From text to configuration values: dotted overrides, unknown keys, and errors in a user's words."""

import dataclasses
import difflib
import enum
import functools
import os
import sys
import typing
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Of every section: what stands below a field describes it, and defaults are checked as well.
STRICT = ConfigDict(use_attribute_docstrings=True, validate_default=True)


class Change(enum.Flag):
    """What another value of a key means to a run that has begun; each key of a configuration has one."""

    TOLD = 0
    """A run that continues does so with other results or another method: a warning names the key."""
    REFUSED = enum.auto()
    """It would see other batches, or hold another model, and is refused."""
    JUDGED = enum.auto()
    """Told, and its validation losses cannot be compared with those before."""
    UNTOLD = enum.auto()
    """It needs no mention."""
    SAME_RUN = enum.auto()
    """To a sweep it is the same run, and is not trained again."""
    LOCAL = enum.auto()
    """The ranks of one run may have different values."""
    FREE = enum.auto()
    """A run that begins with the weights of a checkpoint may have another value: it does not change their
    function, only which outputs are derived from it, or how weights begin and are trained."""


Kind = TypeVar("Kind")
Told = Annotated[Kind, Change.TOLD]
Refused = Annotated[Kind, Change.REFUSED]
Free = Annotated[Kind, Change.REFUSED | Change.FREE]
Judged = Annotated[Kind, Change.JUDGED]
Place = Annotated[Kind, Change.UNTOLD | Change.SAME_RUN]
"""Where a run lies and what it leaves there."""
Local = Annotated[Kind, Change.UNTOLD | Change.SAME_RUN | Change.LOCAL]
"""What it runs on."""


@functools.cache
def changes(root: type, prefix: str = "") -> dict[str, Change]:
    """{"train.seed": Change.REFUSED, ...}: the class of each key below a section, of all variants.

    Raises:
        TypeError: a field without a class, or with two, in one or in several variants.
    """
    found: dict[str, Change] = {}
    for kind in variants(root):
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            if typing.get_origin(hint) is typing.ClassVar:
                continue
            section = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
            if dataclasses.is_dataclass(section):
                found |= changes(section, f"{prefix}{name}.")  # type: ignore[arg-type]
                continue
            classes = [extra for extra in typing.get_args(hint)[1:] if isinstance(extra, Change)]
            if len(classes) != 1:
                raise TypeError(f"field {name} of {kind.__name__} needs one class of Change, got {classes}")
            if (first := found.setdefault(prefix + name, classes[0])) != classes[0]:
                raise TypeError(
                    f"field {name} of {kind.__name__} is {classes[0]}, elsewhere {first}; give it that one"
                )
    return found


def change_of(root: type, key: str) -> Change:
    """The class of a dotted key, or of the table or section that it is in; `TOLD` for what is no key."""
    found = changes(root)
    while key and key not in found:
        key = key.rpartition(".")[0]
    return found.get(key, Change.TOLD)


def _names(value: Any) -> Any:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _pairs(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in _names(value)]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ValueError(
            f"pairs are written NAME=VALUE, with commas between them, got '{wrong[0]}'; write "
            f"{wrong[0]}=VALUE"
        )
    return {name.strip(): text.strip() for name, _, text in pairs}


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
"""A list of names; on the command line "a,b"."""
Pairs = Annotated[dict[str, str], BeforeValidator(_pairs)]
"""A table of names; on the command line "a=b,c=d", or --section.field.a b."""
Factors = Annotated[dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]], BeforeValidator(_pairs)]
"""A table of numbers of at least 0; on the command line as `Pairs`."""


UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path of a file or a folder; ~ is the user's home."""


def split_overrides(
    root: type, argv: typing.Sequence[str], flags: typing.Collection[str]
) -> tuple[list[str], list[str]]:
    """Takes the overrides, `--section.field value ...`, out of a command's arguments: (the rest, overrides).

    Fields that are lists take all values that follow, up to the next option or a file, as the configuration.
    """
    arguments, overrides, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument.split("=")[0] in flags:
            arguments.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument and rest and not rest[0].startswith("--"):
            overrides.append(rest.pop(0))
            while _is_list(root, argument[2:]) and rest and not _ends_list(rest[0]):
                overrides.append(rest.pop(0))
    return arguments, overrides


def _ends_list(argument: str) -> bool:
    return argument.startswith("--") or argument.endswith(".toml") or os.path.isfile(argument)


def parse_overrides(arguments: typing.Sequence[str]) -> list[tuple[str, list[str]]]:
    """["--a.b", "1", "2", "--c=3"] to [("a.b", ["1", "2"]), ("c", ["3"])]; raises ValueError where a value is
    missing."""
    pairs, rest = [], list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise ValueError(f"expected an override of the form --section.field value, got '{key}'")
        key, equals, text = key[2:].partition("=")
        texts = [text] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            texts.append(rest.pop(0))
        if not texts:
            raise ValueError(f"override --{key} has no value; write --{key} VALUE")
        pairs.append((key, texts))
    return pairs


def set_dotted(root: type, values: dict[str, Any], key: str, texts: typing.Sequence[str]) -> None:
    """Sets values[a][b] for key "a.b"; a text is read as a TOML value, or else taken as a string.

    Raises:
        ValueError: not a section, or several texts for a field that is no list.
    """
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"unknown configuration key '{key}': '{section}' is not a section")
    if len(texts) == 1:
        values[name] = _value(root, key, texts[0])
        return
    if not _is_list(root, key):
        raise ValueError(f"configuration key '{key}' takes one value, got {len(texts)}: {' '.join(texts)}")
    parts = [_value(root, key, text) for text in texts]
    values[name] = [name for names in parts for name in names] if _is_names(root, key) else parts


def _value(root: type, key: str, text: str) -> Any:
    """The value of one text for a field; names and paths may look like numbers."""
    kinds = _types(root, key)
    value: Any = text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if text == "none" and type(None) in kinds:
            return None
    if _is_names(root, key) and not isinstance(value, list):
        names = value if isinstance(value, str) else text
        return [text] if os.path.exists(text) else [name.strip() for name in names.split(",") if name.strip()]
    return text if kinds[0] is str and not isinstance(value, str) else value


def _is_list(root: type, key: str) -> bool:
    return typing.get_origin(_types(root, key)[0]) is tuple


def _is_names(root: type, key: str) -> bool:
    return _is_list(root, key) and str in typing.get_args(_types(root, key)[0])


def _types(root: type, key: str) -> list[Any]:
    """The types that the field of a dotted key may have, without what validates them; [None] for no field."""
    kind: Any = root
    for part in key.split("."):
        if not dataclasses.is_dataclass(kind):
            return [None]
        found = (typing.get_type_hints(k).get(part) for k in variants(kind))
        kind = next((hint for hint in found if hint is not None), None)
    return list(typing.get_args(kind)) if type(None) in typing.get_args(kind) else [kind]


def variants(section: Any) -> list[type]:
    """The classes that a section may be of: for [model], those of the model families."""
    return list(getattr(section, "variants", {}).values()) or [section]


def check_keys(root: type, values: dict[str, Any], section: type | None = None, prefix: str = "") -> None:
    """Raises ValueError at the first key that is no field of the dataclass `root` or of its sections."""
    section = section or root
    choose = getattr(section, "choose", None)
    chosen_from: dict[str, type] = getattr(section, "variants", {})
    section = choose(values) if choose else section
    fields = {f.name for f in dataclasses.fields(section)}
    types = typing.get_type_hints(section)
    for key, value in values.items():
        if key not in fields:
            holds = {n: {f.name for f in dataclasses.fields(kind)} for n, kind in chosen_from.items()}
            owners = [n for n, names in holds.items() if key in names]
            if owners:
                mine = next((n for n, kind in chosen_from.items() if kind is section), "another")
                raise ValueError(
                    f"configuration key '{prefix}{key}' is one of the family {' or '.join(owners)}, and of "
                    f"'{mine}' it is not; leave it out, or choose that family"
                )
            raise ValueError(_unknown_key(root, prefix + key, prefix, sorted(fields)))
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise ValueError(
                    f"configuration key '{prefix}{key}' is a section; write [{key}] and its fields below it"
                )
            check_keys(root, value, typing.cast(type, types[key]), f"{prefix}{key}.")


def _unknown_key(root: type, key: str, prefix: str, names: list[str]) -> str:
    """Looks for the nearest key in the same section first, then by its last name in every section."""
    siblings = [prefix + name for name in names]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    if not near:
        last = key.rsplit(".", 1)[-1]
        by_name = {k.rsplit(".", 1)[-1]: k for k in _all_keys(root)}
        near = [by_name[m] for m in difflib.get_close_matches(last, list(by_name), n=1, cutoff=0.6)]
    hint = f"nearest valid key: '{near[0]}'" if near else f"valid keys: {', '.join(siblings)}"
    return f"unknown configuration key '{key}'; {hint}"


def _all_keys(section_type: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    types = typing.get_type_hints(section_type)
    fields = {f.name: f for kind in variants(section_type) for f in dataclasses.fields(kind)}
    for field in fields.values():
        if field.name not in types:  # of another variant of this section
            keys.append(prefix + field.name)
        elif dataclasses.is_dataclass(types[field.name]):
            keys += _all_keys(typing.cast(type, types[field.name]), f"{prefix}{field.name}.")
        else:
            keys.append(prefix + field.name)
    return keys


def explain(error: Any) -> str:
    """One of pydantic's errors as a sentence: the key, the rule, what was got, the nearest valid value."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":  # one of our own cross-field rules, complete as it is
        return str(error["ctx"]["error"])
    message = (
        f"configuration key '{key}': {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
    )
    if error["type"] == "literal_error":
        valid = [part.strip(" '") for part in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
        near = difflib.get_close_matches(str(error["input"]), valid, n=1, cutoff=0.4)
        message += f"; nearest: '{near[0]}'" if near else ""
    return message
