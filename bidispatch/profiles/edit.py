"""Profiles for people: a resolved one as YAML, the differences between two, and a starter to edit."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bidispatch.device import Arch
from bidispatch.errors import UsageError
from bidispatch.profiles.load import builtin_folder, user_folder
from bidispatch.profiles.profile import Profile, ProfileCandidate, ProfileRule, Source
from bidispatch.profiles.schema import Condition
from bidispatch.registry import Registry

__all__ = ["Change", "as_json", "as_yaml", "differences", "rule_lines", "starter", "write_new"]

# What may stand without quotes: a word no YAML reader takes for a number, a bool or nothing.
_PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off)$)[A-Za-z_][\w./-]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Change:
    """Something two resolved profiles say differently. An empty side says nothing."""

    where: str
    before: str
    after: str
    before_source: str = ""
    after_source: str = ""


def as_json(profile: Profile) -> dict[str, Any]:
    """A resolved profile as plain data, with the source of each rule and candidate."""
    return {
        "name": profile.name,
        "chain": list(profile.chain),
        "note": profile.note,
        "match": dict(profile.match) if profile.match else None,
        "invariance": {"require": profile.require.label, "trust": profile.trust},
        "prefer": [{"impl": name, "source": str(source)} for name, source in profile.prefer],
        "disable": {name: {"reason": reason, "source": str(s)} for name, (reason, s) in profile.disable.items()},
        "ops": {op: [_rule_json(rule) for rule in rules] for op, rules in profile.rules.items()},
    }


def _rule_json(rule: ProfileRule) -> dict[str, Any]:
    return {
        **_rule_head(rule),
        "source": str(rule.source),
        "candidates": [{**_candidate(c), "source": str(c.source)} for c in rule.candidates],
    }


def _rule_head(rule: ProfileRule) -> dict[str, Any]:
    head: dict[str, Any] = {"dtypes": list(rule.dtypes)}
    if rule.when:
        head["when"] = {dim: _condition(condition) for dim, condition in rule.when.items()}
    if rule.numerics:
        head["numerics"] = rule.numerics
    if rule.tuned:
        head["tuned"] = [str(tuned.path) for tuned in rule.tuned]
    return head


def _condition(condition: object) -> object:
    if isinstance(condition, Condition):
        return condition.model_dump(by_alias=True, exclude_none=True)
    return condition


def _candidate(candidate: ProfileCandidate) -> dict[str, Any]:
    content: dict[str, Any] = {"impl": candidate.impl}
    if candidate.max_m is not None:
        content["max_m"] = candidate.max_m
    if candidate.params:
        content["params"] = dict(candidate.params)
    if candidate.tile is not None:
        content["tile"] = dict(candidate.tile)
    return content


def as_yaml(profile: Profile) -> str:
    """A resolved profile as a profile file that needs no `extends`, each line with its source."""
    lines = [f"# {profile.name}, resolved: {' <- '.join(profile.chain)}", "schema_version: 1", f"name: {profile.name}"]
    if profile.match:
        lines.append(f"match: {_flow({key: value for key, value in profile.match.items() if value is not None})}")
    lines.append(f"invariance: {_flow({'require': profile.require.label, 'trust': profile.trust})}")
    if profile.prefer:
        lines += ["prefer:", *(_noted(f"  - {_flow(name)}", source) for name, source in profile.prefer)]
    if profile.disable:
        lines.append("disable:")
        lines += [_noted(f"  {_flow(n)}: {_flow(why)}", source) for n, (why, source) in profile.disable.items()]
    lines.append("ops:" if profile.rules else "ops: {}")
    for op, rules in profile.rules.items():
        lines.append(f"  {op}:" if rules else f"  {op}: []")
        for rule in rules:
            lines += rule_lines(rule)
    return "\n".join(lines) + "\n"


def rule_lines(rule: ProfileRule, tuned: Sequence[Path] = ()) -> list[str]:
    """A rule as lines of YAML under its op, each with its source. tuned: files to put before those it names; one that
    it names already is there once.
    """
    head = _rule_head(rule)
    if tuned:
        files = [*tuned, *(named.path for named in rule.tuned)]
        head["tuned"] = list(dict.fromkeys(str(file.resolve()) for file in files))
    first, *others = (f"{key}: {_flow(value)}" for key, value in head.items())
    lines = [_noted(f"    - {first}", rule.source), *(f"      {other}" for other in others), "      candidates:"]
    return lines + [_noted(f"        - {_flow(_candidate(c))}", c.source) for c in rule.candidates]


def _noted(text: str, source: Source) -> str:
    return f"{text}  # {source}"


def _flow(value: object) -> str:
    """A value on one line, as YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_flow(inner) for inner in value) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)


def differences(before: Profile, after: Profile) -> list[Change]:
    """What two resolved profiles say differently, op by op and rule by rule."""
    changes = [
        *_change("invariance.require", before.require.label, after.require.label),
        *_change("invariance.trust", before.trust, after.trust),
        *_change("prefer", _flow([n for n, _ in before.prefer]), _flow([n for n, _ in after.prefer])),
    ]
    for name in _union(before.disable, after.disable):
        old, new = before.disable.get(name), after.disable.get(name)
        changes += _change(
            f"disable {name}",
            old[0] if old else "",
            new[0] if new else "",
            str(old[1]) if old else "",
            str(new[1]) if new else "",
        )
    for op in _union(before.rules, after.rules):
        changes += _rule_changes(op, before.rules.get(op, ()), after.rules.get(op, ()))
    return changes


def _rule_changes(op: str, before: Sequence[ProfileRule], after: Sequence[ProfileRule]) -> Iterator[Change]:
    old, new = _by_problems(before), _by_problems(after)
    for what in _union(old, new):
        was, now = old.get(what), new.get(what)
        yield from _change(
            f"{op} {what}",
            _body(was) if was else "",
            _body(now) if now else "",
            str(was.source) if was else "",
            str(now.source) if now else "",
        )
    shared_before, shared_after = [k for k in old if k in new], [k for k in new if k in old]
    if shared_before != shared_after:
        # The first rule that matches is used, so their order says something.
        yield from _change(f"{op}, order of rules", "; ".join(shared_before), "; ".join(shared_after))


def _by_problems(rules: Sequence[ProfileRule]) -> dict[str, ProfileRule]:
    """Rules by the problems they are for."""
    named: dict[str, ProfileRule] = {}
    for rule in rules:
        head = _rule_head(rule)
        what = " ".join([_flow(sorted(rule.dtypes)), *([f"when {_flow(head['when'])}"] if rule.when else [])])
        while what in named:
            what += " again"
        named[what] = rule
    return named


def _body(rule: ProfileRule) -> str:
    candidates = ", ".join(_flow(_candidate(candidate)) for candidate in rule.candidates)
    tuned = f" tuned {_flow([tuned.shown for tuned in rule.tuned])}" if rule.tuned else ""
    return f"[{candidates}]" + (f" numerics {rule.numerics}" if rule.numerics else "") + tuned


def _union(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return list(dict.fromkeys([*before, *after]))


def _change(where: str, before: str, after: str, before_source: str = "", after_source: str = "") -> Iterator[Change]:
    if before != after:
        yield Change(where, before, after, before_source, after_source)


def starter(arch: Arch, registry: Registry) -> str:
    """The text of a profile for an arch that changes nothing yet: two lines to uncomment, over what is built in."""
    base = next((name for name in (arch.name, arch.family) if (builtin_folder() / f"{name}.yaml").is_file()), "_base")
    names = sorted(i.name for i in registry if i.covers(arch.name, "bfloat16")) or ["backend.kernel"]
    because = f"{base} is the built-in profile" if base == arch.name else f"{arch.name} has no profile built in"
    return f"""\
# yaml-language-server: $schema={(builtin_folder() / "schema.json").as_posix()}
# {arch.name} ({arch.products}). {because}; this file edits {base}.
# In {user_folder()} it is used whenever the device is {arch.name};
# anywhere else, with BIDISPATCH_PROFILE or `bidispatch plan --profile FILE`.
# Check it with `bidispatch profile lint FILE`; `bidispatch profile diff {builtin_folder() / f"{base}.yaml"} FILE`
# shows what it changes.
schema_version: 1
extends: {base}
match: {{arch: {arch.name}}}

# Take away a `#` to make an edit. Implementations for {arch.name}:
{textwrap.fill(", ".join(names), 100, initial_indent="#   ", subsequent_indent="#   ")}
# prefer: [{names[0]}]
# disable: {{{names[-1]}: "why it is left out, which `bidispatch explain` shows"}}

# What a plan promises, and whether a kernel's claim is enough or `bidispatch verify --record` must have proved it.
# invariance: {{require: sequence, trust: verified}}

# Rules replace the inherited ones of the same op: `bidispatch profile show {base} --resolved` prints those.
"""


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet. Raises `UsageError` where it does, or cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        why = "is there already and is not overwritten" if path.exists() else f"cannot be written ({error.strerror})"
        raise UsageError(f"{path} {why}; name another file with --out") from error
