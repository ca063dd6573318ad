"""From text to configuration values: dotted overrides, unknown keys, and errors in a user's words."""

import dataclasses
import difflib
import sys
import typing
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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


def parse_overrides(arguments: typing.Sequence[str]) -> list[tuple[str, str]]:
    """["--a.b", "1", "--c=2"] to [("a.b", "1"), ("c", "2")]; raises ValueError where a value is missing."""
    pairs, rest = [], list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise ValueError(f"expected an override of the form --section.field value, got '{key}'")
        key, equals, text = key[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"override --{key} has no value; write --{key} VALUE")
            text = rest.pop(0)
        pairs.append((key, text))
    return pairs


def set_dotted(root: type, values: dict[str, Any], key: str, text: str) -> None:
    """Sets values[a][b] for key "a.b"; the text is read as a TOML value, or else taken as a string."""
    value: Any = text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if text == "none" and _may_be_none(root, key):
            value = None
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"unknown configuration key '{key}': '{section}' is not a section")
    if name == "paths" and isinstance(value, str):
        value = value.split(",")
    values[name] = value


def _may_be_none(root: type, key: str) -> bool:
    """Whether the field of a dotted key is optional, so that "none" leaves it out."""
    section: Any = root
    for part in key.split("."):
        section = typing.get_type_hints(section, include_extras=True).get(part)
        if not dataclasses.is_dataclass(section):
            break
    return type(None) in typing.get_args(section)


def check_keys(root: type, values: dict[str, Any], section: type | None = None, prefix: str = "") -> None:
    """Raises ValueError at the first key that is no field of the dataclass `root` or of its sections."""
    section = section or root
    fields = {f.name for f in dataclasses.fields(section)}
    types = typing.get_type_hints(section)
    for key, value in values.items():
        if key not in fields:
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
    for field in dataclasses.fields(section_type):
        if dataclasses.is_dataclass(types[field.name]):
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
