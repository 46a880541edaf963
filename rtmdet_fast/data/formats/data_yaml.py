"""The part of YAML that a data.yaml is written in: scalars, and lists and maps of them, in both styles.

Anything else in the keys asked for is refused with its line; nothing is guessed, and every scalar is text. What is read
is what PyYAML reads (its BaseLoader), without the dependency.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from rtmdet_fast.data.formats.files import read_text
from rtmdet_fast.errors import UserError, shown

Value = str | None | list[str] | dict[str, str]

_QUOTED = r'"(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\''
_KEY = re.compile(rf"({_QUOTED}|[^\s\"'\[\]{{}},#&*!|>%@`?:-](?:[^:#]|:(?=\S)|(?<=\S)#)*?)\s?:(?=\s|$)")
_ITEM = rf"(?:({_QUOTED})\s*|([^\s\"',\[\]{{}}][^,\[\]{{}}]*)|)"
_LIST_ITEM = re.compile(rf"\s*{_ITEM}([,\]])")
_MAP_ITEM = re.compile(rf"\s*(?:({_QUOTED})\s*:|([^\s\"',\[\]{{}}:][^,\[\]{{}}:]*):(?=[\s,}}]))\s*{_ITEM}([,}}])")
_END = {"[": re.compile(r"\s*\]"), "{": re.compile(r"\s*\}")}


class _Refused(Exception):
    """What this part of YAML does not have."""


def read_yaml(path: Path, keys: Collection[str]) -> dict[str, Value]:
    """Those of the top-level keys that the file has. Raises UserError, naming the line, where one cannot be read."""
    found: dict[str, Value] = {}
    entries: list[tuple[str, str, list[str], int]] = []
    try:
        _add_entries(read_text(path), entries)
        for key, rest, body, number in [entry for entry in entries if entry[0] in keys]:
            entries = [(key, rest, body, number)]
            if key in found:
                raise _Refused(f"{key} occurs twice")
            found[key] = _value(rest, body)
    except _Refused as refusal:
        number = refusal.args[1] if len(refusal.args) > 1 else entries[-1][3] if entries else 1
        raise UserError(
            f"{shown(str(path))}, line {number}: {refusal.args[0]}; write names as `names: [cat, dog]` or a line "
            "each, and folders as text"
        ) from None
    return found


def _add_entries(text: str, entries: list[tuple[str, str, list[str], int]]) -> None:
    """Key, what follows it on its line, the lines that belong to it, and the line's number, of every top-level key."""
    for number, line in enumerate(text.splitlines(), start=1):
        bare = line.rstrip(" ")
        if number == 1 and bare == "---":
            continue
        if entries and _is_open(entries[-1]):
            entries[-1][2].append(bare)
        elif not bare or bare.lstrip(" ").startswith("#"):
            if entries:
                entries[-1][2].append("")
        elif bare[0] in " \t" or bare.startswith("- ") or bare == "-":
            if not entries:
                raise _Refused("a line that belongs to no key", number)
            entries[-1][2].append(bare)
        elif match := _KEY.match(bare):
            entries.append((_scalar(match[1].strip()) or "", bare[match.end() :].strip(" "), [], number))
        else:
            raise _Refused(f"no `key: value` ({shown(bare[:60])})", number)


def _is_open(entry: tuple[str, str, list[str], int]) -> bool:
    """Whether a list or map in brackets goes on."""
    _, rest, body, _ = entry
    if not rest.startswith(("[", "{")):
        return False
    bare = "".join(map(_bare, (rest, *body)))
    return sum(map(bare.count, "[{")) > sum(map(bare.count, "]}"))


def _value(rest: str, body: list[str]) -> Value:
    if any("\t" in line for line in (rest, *body)):
        raise _Refused("a tab, where YAML has spaces")
    rest = _uncommented(rest).strip()
    lines = [line for line in map(_uncommented, body) if line.strip()]
    if rest[:1] in tuple("&*!|>%@`"):
        raise _Refused(f"a value that begins with {rest[0]}")
    if rest:
        if rest[0] in "[{":
            return _flow("\n".join([rest, *(line.strip() for line in lines)]))
        if lines:
            raise _Refused("a value of several lines")
        return _scalar(rest)
    if not lines:
        return None
    indent = len(lines[0]) - len(lines[0].lstrip(" "))
    if any(len(line) - len(line.lstrip(" ")) != indent for line in lines):
        raise _Refused("lines of one list or map begin at different columns")
    lines = [line.strip() for line in lines]
    if all(line.startswith("- ") or line == "-" for line in lines):
        return [_item(line[1:]) for line in lines]
    pairs: dict[str, str] = {}
    for line in lines:
        match = _KEY.match(line)
        if not match:
            raise _Refused(f"neither a list nor a map of plain values ({shown(line[:60])})")
        _add(pairs, match[1], line[match.end() :])
    return pairs


def _flow(text: str) -> list[str] | dict[str, str]:
    """A list or map in brackets."""
    items: list[str] = []
    pairs: dict[str, str] = {}
    at, closed = 1, _END[text[0]].match(text, 1)
    while not closed:
        match = (_LIST_ITEM if text[0] == "[" else _MAP_ITEM).match(text, at)
        if not match:
            raise _Refused("a list or map in brackets that holds more than plain values")
        *parts, last = match.groups("")
        if len(parts) == 2:
            items.append(_item(parts[0] or parts[1]))
        else:
            _add(pairs, parts[0] or parts[1], parts[2] or parts[3])
        at = match.end()
        closed = _END[text[0]].match(text, at if last == "," else at - 1)
    if text[closed.end() :].strip():
        raise _Refused("something behind a closed bracket")
    return items if text[0] == "[" else pairs


def _add(pairs: dict[str, str], key: str, value: str) -> None:
    name = _scalar(key.strip()) or ""
    if name in pairs:
        raise _Refused(f"{shown(name)} occurs twice")
    pairs[name] = _item(value)


def _item(text: str) -> str:
    """A value of a list or map."""
    value = _scalar(text.strip())
    if value is None or "\n" in value or text.strip()[:1] in tuple("[{"):
        raise _Refused("a list or map of more than plain values, or an empty one")
    return value


def _scalar(text: str) -> str | None:
    if not text:
        return None
    if text[0] in "\"'":
        if not re.fullmatch(_QUOTED, text):
            raise _Refused("quotation marks that do not enclose all of a value")
        if text[0] == "'":
            return text[1:-1].replace("''", "'")
        try:
            return json.loads(text)
        except ValueError:
            raise _Refused("an escape that is not JSON's") from None
    if text[0] in "&*!|>%@`,[]{}#" or re.match(r"[-?:]( |$)", text) or re.search(r":( |$)", text):
        raise _Refused(f"not a plain value ({shown(text[:60])})")
    return text


def _uncommented(line: str) -> str:
    return line[: len(_bare(line))].rstrip()


def _bare(line: str) -> str:
    """A line up to its comment, with what stands in quotation marks as underscores."""
    bare: list[str] = []
    quote = ""
    for i, letter in enumerate(line):
        if quote:
            bare.append("_")
            if letter == quote and not (quote == '"' and (i - len(line[:i].rstrip("\\"))) % 2):  # not escaped
                quote = ""
        elif letter == "#" and (i == 0 or line[i - 1] == " "):
            break
        elif letter in "\"'" and (i == 0 or line[i - 1] in " \t[{,:"):
            quote = letter
            bare.append("_")
        else:
            bare.append(letter)
    if quote:
        raise _Refused("quotation marks that are not closed on their line")
    return "".join(bare)
