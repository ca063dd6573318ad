"""The command `megagnn config`: every key of a configuration with its type, default and meaning."""

import argparse
import dataclasses
import difflib
import inspect
import json
import textwrap
import typing
from typing import Any

from pydantic import TypeAdapter

from megagnn.config import RunConfig
from megagnn.overrides import variants

_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn config`."""
    parser.add_argument(
        "--describe",
        nargs="?",
        const="",
        required=True,
        metavar="SECTION",
        help="print all keys with type, default and meaning, or those of a section, such as optim",
    )


def run(arguments: argparse.Namespace) -> int:
    """`megagnn config --describe [SECTION]`."""
    print(describe(arguments.describe))
    return 0


def describe(section: str = "") -> str:
    """The keys of a section, of all where none is named; of [model], those of every family.

    Raises:
        ValueError: no such section; names the nearest.
    """
    hints = typing.get_type_hints(RunConfig)
    sections = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    if section and section not in sections:
        near = difflib.get_close_matches(section, sections, n=1)
        hint = f"nearest: '{near[0]}'" if near else f"there are {', '.join(sections)}"
        raise ValueError(f"no section [{section}] in a configuration; {hint}")
    lines = [] if section else _keys(RunConfig, set(sections))
    for name, kind in sections.items():
        if section in ("", name):
            lines += _section(name, typing.cast(type, kind))
    return "\n".join(lines).strip("\n")


def _section(name: str, kind: type) -> list[str]:
    """A section: its meaning and keys; with several variants, what they share and what each adds."""
    lines, shared = (
        ["", f"[{name}]  {inspect.getdoc(kind)}"],
        {field.name for field in dataclasses.fields(kind)},
    )
    families = [variant for variant in variants(kind) if variant is not kind]
    lines += _keys(kind, {"family", "preset"} if families else set())
    for variant in families:
        default = {field.name: field.default for field in dataclasses.fields(variant)}["family"]
        lines += ["", f"[{name}] with family = {json.dumps(default)}  {inspect.getdoc(variant)}"]
        lines += _keys(variant, shared - {"family", "preset"})
    return lines


def _keys(kind: type, without: set[str]) -> list[str]:
    schema = TypeAdapter(kind).json_schema(mode="validation")
    lines: list[str] = []
    for name, value in schema["properties"].items():
        if name in without:
            continue
        default = json.dumps(value.get("default", {}), ensure_ascii=False).replace("null", "none")
        lines.append(f"  {name} = {default}  ({_type(value)})")
        meaning = " ".join(value.get("description", "").split())
        lines += textwrap.wrap(meaning, 100, initial_indent="      ", subsequent_indent="      ")
    return lines


def _type(schema: dict[str, Any]) -> str:
    """A type of JSON schema in words: `integer > 0 or none`."""
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {', '.join(map(_type, schema['prefixItems']))}"
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if schema.get("type") == "object":
        return f"table of {_type(schema['additionalProperties'])}"
    bounds = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    return " ".join([schema["type"].replace("null", "none"), *bounds])
