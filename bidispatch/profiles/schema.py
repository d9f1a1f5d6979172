"""The shape of a profile file, as pydantic models. `schema.json`, which editors read, is generated from them:
`python -m bidispatch.profiles.schema > hw_profiles/schema.json`.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticKnownError

from bidispatch import ops
from bidispatch.device import ARCHS
from bidispatch.invariance import Invariance
from bidispatch.ops.schema import DTYPES

__all__ = [
    "Candidate",
    "Condition",
    "InvarianceSection",
    "Match",
    "ProfileFile",
    "Rule",
    "json_schema",
    "json_schema_text",
]

Scalar = bool | int | float | str


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=False)


class Condition(_Section):
    """What a dim must satisfy for a rule to be used. All the given parts must hold."""

    multiple_of: int | None = Field(None, gt=0, description="the dim is a multiple of this")
    min: int | float | None = Field(None, description="the dim is at least this")
    max: int | float | None = Field(None, description="the dim is at most this")
    one_of: list[Scalar] | None = Field(None, alias="in", min_length=1, description="the dim is one of these")


class Candidate(_Section):
    """An implementation, how far it serves, and with what params."""

    impl: str = Field(description="the implementation, as backend.kernel")
    max_m: int | None = Field(None, gt=0, description="it serves calls of up to this many rows; without it, any")
    params: dict[str, Scalar] = Field(
        default_factory=dict, description="reduction params: what fixes the bits. Those not given keep their default"
    )
    tile: dict[str, Scalar] | None = Field(
        None,
        description="launch shape: never changes bits. Without it the implementation chooses by the rows of a call",
    )


class Rule(_Section):
    """Candidates for some dtypes and dims. The first rule that matches a problem is used."""

    dtypes: list[str] = Field(min_length=1, description="dtypes this rule is for")
    when: dict[str, Scalar | Condition] = Field(default_factory=dict, description="conditions on dims; all must hold")
    numerics: str | None = Field(None, description="the numerics class every rung must have; else the first rung's")
    tuned: list[str] = Field(
        default_factory=list,
        description="files that `bidispatch tune` wrote, relative to this one: a problem's ladder in the first that "
        "has one comes before the candidates",
    )
    candidates: list[Candidate] = Field(
        min_length=1, description="by rising max_m; a rung that cannot be had leaves its range to the next"
    )


class Match(_Section):
    """Which device a profile is for."""

    arch: str = Field(description="arch name, such as sm90")
    device_name: str | None = Field(None, description='a glob on the device\'s name, such as "NVIDIA H200*"')


class InvarianceSection(_Section):
    """What a plan promises, and what it takes as evidence."""

    require: Literal["run", "batch", "sequence", "topology"] | None = Field(
        None, description="the level every chosen implementation must claim"
    )
    trust: Literal["claimed", "verified"] | None = Field(
        None, description="claimed: the code's word is enough; verified: only what `bidispatch verify` recorded here"
    )


class ProfileFile(_Section):
    """A hardware profile, as it stands in one file."""

    schema_version: Literal[1] = Field(description="the version of this format")
    name: str | None = Field(None, description="the profile's name; the file's, without .yaml, if not given")
    extends: str | None = Field(None, description="the profile this one edits: mappings merge, lists are replaced")
    match: Match | None = Field(None, description="which device this profile is for")
    invariance: InvarianceSection = Field(default_factory=InvarianceSection)
    ops: dict[str, list[Rule]] = Field(default_factory=dict, description="rules for each op")
    prefer: list[str] | None = Field(None, description="implementations to try first, for every M, where they fit")
    disable: dict[str, str] = Field(
        default_factory=dict, description="implementations to leave out, each with a reason"
    )

    @field_validator("schema_version", mode="before")
    @classmethod
    def _true_is_no_version(cls, value: object) -> object:
        if isinstance(value, bool):  # which equals 1, and pydantic compares by that
            raise PydanticKnownError("literal_error", {"expected": "1"})
        return value


def json_schema() -> dict[str, Any]:
    """The JSON schema for editors: the models above, with the names that exist filled in."""
    schema = ProfileFile.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "bidispatch hardware profile"
    definitions = schema["$defs"]
    definitions["Rule"]["properties"]["dtypes"]["items"] = {"enum": [*DTYPES, *DTYPES.values()]}
    definitions["Match"]["properties"]["arch"] = {
        **definitions["Match"]["properties"]["arch"],
        "enum": list(ARCHS),
    }
    schema["properties"]["ops"]["propertyNames"] = {"enum": [op.name for op in ops.CATALOGUE.values() if op.available]}
    levels = [level.label for level in Invariance]
    if levels != ["run", "batch", "sequence", "topology"]:
        raise RuntimeError(f"InvarianceSection.require must list the levels {levels}")
    return schema


def json_schema_text() -> str:
    """The JSON schema as `hw_profiles/schema.json` holds it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(json_schema_text())
