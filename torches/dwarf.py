"""The memory of C++ types from the debugging information of an object file, as ``readelf`` prints it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_ENTRY = re.compile(r" *<([0-9a-f]+)><([0-9a-f]+)>: Abbrev Number: \d+ \(DW_TAG_(\w+)\)")
_ATTRIBUTE = re.compile(r" *<[0-9a-f]+> +DW_AT_(\w+) *: ?(.*)")
_RECORDS = {"structure_type", "class_type", "union_type"}
# Between a member and the record or enumeration that its type is named after.
_BETWEEN = {
    "pointer_type",
    "reference_type",
    "rvalue_reference_type",
    "const_type",
    "volatile_type",
    "typedef",
}
_BETWEEN |= {"array_type", "atomic_type", "restrict_type"}
# What such a type names lies elsewhere in memory.
_ELSEWHERE = {"pointer", "reference", "rvalue_reference"}
_KEPT = (
    _RECORDS
    | _BETWEEN
    | {"namespace", "member", "inheritance", "subprogram", "enumeration_type", "enumerator"}
)
_KEPT |= {"base_type", "subrange_type", "compile_unit"}
_ATTRIBUTES = {
    "name",
    "type",
    "byte_size",
    "data_member_location",
    "data_bit_offset",
    "bit_size",
    "declaration",
}
_ATTRIBUTES |= {
    "specification",
    "virtuality",
    "vtable_elem_location",
    "linkage_name",
    "const_value",
    "upper_bound",
}


@dataclass
class Entry:
    """An entry of the debugging information."""

    tag: str
    parent: Entry | None
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Entry] = field(default_factory=list)


class Types:
    """The types that an object file tells of."""

    def __init__(self, compiled: Path) -> None:
        self._entries: dict[str, Entry] = {}
        command = ["readelf", "--debug-dump=info", "--wide", str(compiled)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            self._read(process.stdout)
        self._defined: dict[str, Entry] = {}
        for entry in self._entries.values():
            if entry.tag in _RECORDS and "declaration" not in entry.attributes:
                self._defined.setdefault(self._name(entry), entry)

    def _read(self, lines: Iterable[str]) -> None:
        above: list[Entry | None] = []
        entry: Entry | None = None
        for line in lines:
            if found := _ENTRY.match(line):
                depth, offset, tag = int(found[1], 16), found[2], found[3]
                del above[depth:]
                entry = Entry(tag, above[-1] if above else None) if tag in _KEPT else None
                above.append(entry)
                if entry is not None:
                    self._entries[offset] = entry
                    if entry.parent is not None:
                        entry.parent.children.append(entry)
            elif entry is not None and (found := _ATTRIBUTE.match(line)) and found[1] in _ATTRIBUTES:
                entry.attributes[found[1]] = _value(found[1], found[2])

    def pointed_at_by(self, name: str) -> dict[str, list[str]]:
        """What members of the record ``name`` point at, and what lies in that, by name: what lies where.

        Raises:
            ValueError: the object file does not define ``name``.
        """
        if name not in self._defined:
            raise ValueError(f"the object file does not define {name}")
        found: dict[str, list[str]] = {}
        members = (child for child in self._defined[name].children if child.tag == "member")
        waiting = [
            lies for member in members for lies in self._type(member.attributes["type"], pointed=True)[1]
        ]
        while waiting:
            entry = waiting.pop()
            full = self._name(entry)
            if full not in found:
                found[full], further = self._described(entry)
                waiting.extend(further)
        return found

    def _described(self, entry: Entry) -> tuple[list[str], list[Entry]]:
        lines, further = [f"size {entry.attributes.get('byte_size', '0')}"], []
        for child in entry.children:
            known = child.attributes
            if child.tag == "enumerator":
                lines.append(f"{known['name']} = {known['const_value']}")
            elif _is_part(child, entry):
                text, inside = self._type(known.get("type", ""))
                lines.append(f"at {_where(known)}: {known.get('name', child.tag)}: {text}")
                further += inside
            elif child.tag == "subprogram" and "virtuality" in known:
                # A destructor has no number, and two places where it stands.
                number = known.get("vtable_elem_location", "?")
                lines.append(f"virtual {number}: {known.get('linkage_name', known['name'])}")
        return lines, further

    def _type(self, offset: str, *, pointed: bool = False) -> tuple[str, list[Entry]]:
        """How a type is written, and the record or enumeration there, or ``pointed`` at from there."""
        entry, wrapped = self._entries.get(offset), []
        while entry is not None and entry.tag in _BETWEEN:
            if entry.tag == "array_type":
                bounds = " ".join(child.attributes.get("upper_bound", "?") for child in entry.children)
                wrapped.append(f"array {bounds}")
            elif entry.tag != "typedef":
                wrapped.append(entry.tag.removesuffix("_type"))
            entry = self._entries.get(entry.attributes.get("type", ""))
        if entry is None:
            return " ".join([*wrapped, "void"]), []
        name = self._name(entry)
        text = " ".join([*wrapped, name])
        if _ELSEWHERE.intersection(wrapped) and not pointed:
            return text, []
        if entry.tag in _RECORDS and "declaration" in entry.attributes:
            entry = self._defined.get(name)
        return text, [entry] if entry is not None and entry.tag in _RECORDS | {"enumeration_type"} else []

    def _name(self, entry: Entry) -> str:
        if "specification" in entry.attributes:
            entry = self._entries[entry.attributes["specification"]]
        parent = entry.parent
        own = entry.attributes.get("name")
        if own is None:
            # By identity: equal ones may lie side by side.
            beside = [] if parent is None else parent.children
            alike = [id(c) for c in beside if c.tag == entry.tag and "name" not in c.attributes]
            own = f"{entry.tag} {alike.index(id(entry)) if alike else 0}"
        if parent is None or parent.tag not in _RECORDS | {"namespace"}:
            return own
        return f"{self._name(parent)}::{own}"


def _is_part(child: Entry, of: Entry) -> bool:
    """Is it a base or a member, and no static one?"""
    placed = child.attributes.keys() & {"data_member_location", "data_bit_offset"}
    return child.tag == "inheritance" or (child.tag == "member" and (bool(placed) or of.tag == "union_type"))


def _where(part: dict[str, str]) -> str:
    if "data_bit_offset" in part:
        return f"bit {part['data_bit_offset']}, {part['bit_size']} bits"
    return part.get("data_member_location", "0")


def _value(attribute: str, text: str) -> str:
    """What an attribute says, without the form that some versions of ``readelf`` put before it."""
    if attribute in ("type", "specification"):
        found = re.search(r"<0x([0-9a-f]+)>", text)
        return found[1] if found else ""
    if attribute == "vtable_elem_location":
        found = re.search(r"DW_OP_constu: (\d+)", text)
        return found[1] if found else text.strip()
    text = re.sub(r"^\(\w+\)\s+", "", text)
    text = re.sub(r"^\((?:[\w ]+, )?offset: 0x[0-9a-f]+\): ", "", text)
    return text.partition("\t")[0].strip()
