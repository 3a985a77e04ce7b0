"""The software in CodeMeta (3.0): codemeta.json, from pyproject.toml and CITATION.cff."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

FILE = Path("codemeta.json")
PROJECT, CITATION = Path("pyproject.toml"), Path("CITATION.cff")


def description(root: Path = Path()) -> dict[str, Any]:
    """Return what codemeta.json has to say, by the two files under `root`."""
    project = tomllib.loads((root / PROJECT).read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((root / CITATION).read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    return {
        "@context": "https://w3id.org/codemeta/3.0",
        "@type": "SoftwareSourceCode",
        "name": project["name"],
        "version": project["version"],
        "description": project["description"],
        "license": f"https://spdx.org/licenses/{project['license']}",
        "author": [_agent(one) for one in citation["authors"]],
        "programmingLanguage": "Python",
        "runtimePlatform": f"Python {project['requires-python']}",
        "softwareRequirements": [_requirement(text) for text in project["dependencies"]],
        "referencePublication": {
            "@type": "ScholarlyArticle",
            "name": paper["title"],
            "author": [_agent(one) for one in paper["authors"]],
            "isPartOf": {"@type": "PublicationIssue", "name": paper["collection-title"]},
            "datePublished": str(paper["year"]),
        },
    }


def text(root: Path = Path()) -> str:
    """Return the content of codemeta.json."""
    return json.dumps(description(root), indent=2, ensure_ascii=False) + "\n"


def _agent(of: dict[str, str]) -> dict[str, str]:
    if "name" in of:
        return {"@type": "Organization", "name": of["name"]}
    return {"@type": "Person", "givenName": of["given-names"], "familyName": of["family-names"]}


def _requirement(text: str) -> dict[str, str]:
    name, version = re.fullmatch(r"([A-Za-z0-9_.-]+)(.*)", text.partition(";")[0].strip(), re.S).groups()  # type: ignore[union-attr]
    return {"@type": "SoftwareApplication", "name": name, "version": version.strip()}
