"""The run as an RO-Crate (1.1): which step made what from what, for programs.

A run is a Provenance Run Crate (Workflow Run RO-Crate 0.5): the workflow, each of its steps, each step's execution with
the files that it read and wrote. A record carries no workflow: it is a Process Run Crate.
"""

from __future__ import annotations

import mimetypes
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pipeline.deposit.codemeta import CITATION, PROJECT
from pipeline.deposit.finished import Run, Step
from pipeline.tables.paper import caveat

WFRUN = "https://w3id.org/ro/wfrun"
PROFILES = {"Process Run Crate": f"{WFRUN}/process/0.5", "Workflow Run Crate": f"{WFRUN}/workflow/0.5"}
PROFILES |= {"Provenance Run Crate": f"{WFRUN}/provenance/0.5"}
WORKFLOW_CRATE = {"Workflow RO-Crate": "https://w3id.org/workflowhub/workflow-ro-crate/1.0"}
SNAKEFILE = "Snakefile"
_DONE = "http://schema.org/CompletedActionStatus"
_KINDS = {
    ".md": "text/markdown",
    ".yaml": "application/yaml",
    ".lock": "text/plain",
    ".tex": "application/x-tex",
    ".cff": "application/yaml",
    ".parquet": "application/vnd.apache.parquet",
    ".safetensors": "application/octet-stream",
    "": "text/plain",
}
_TOOLS = {"snakemake": "https://snakemake.github.io"}


def write(run: Run, folder: Path) -> None:
    """Write ro-crate-metadata.json and ro-crate-preview.html of the artifact in `folder`, after all else in it."""
    from rocrate.model import ComputationalWorkflow, ContextEntity, File
    from rocrate.rocrate import ROCrate

    crate = ROCrate(version="1.1", gen_preview=True)
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    authors = yaml.safe_load(CITATION.read_text(encoding="utf-8"))["authors"]

    def add(at: str, kind: str, /, **properties: Any) -> Any:
        values = {key: _compact(value) for key, value in properties.items()}
        return crate.add(ContextEntity(crate, at, {"@type": kind, **values}))

    profiles = PROFILES if not run.is_record else dict([next(iter(PROFILES.items()))])
    if not run.is_record:
        profiles = profiles | WORKFLOW_CRATE
    licence = add(f"https://spdx.org/licenses/{project['license']}", "CreativeWork", name=project["license"])
    makers = [
        add(f"#author-{number}", "Organization" if "name" in one else "Person", name=_name(one))
        for number, one in enumerate(authors, start=1)
    ]
    root = crate.root_dataset
    crate.name = f"{project['name']}: {run.title}"
    crate.description = " ".join(
        part
        for part in (
            f"{project['description']}.",
            f"{caveat(run.profile, True, run.drawn)}." if caveat(run.profile, True, run.drawn) else "",
            "Trained weights and prepared data are named with their checksums where they are not in here.",
        )
        if part
    )
    crate.datePublished = run.date
    root["license"], root["author"], root["publisher"] = licence, _compact(makers), makers[0]
    root["keywords"] = ["semantic segmentation", "RefineNet", "reproduction"]
    root["conformsTo"] = _compact(
        [
            add(address, "CreativeWork", name=name, version=address.rpartition("/")[2])
            for name, address in profiles.items()
        ]
    )
    crate.metadata.extra_terms["sha256"] = "http://schema.org/sha256"  # not in RO-Crate's own context before 1.2
    if run.commit:
        root["identifier"] = f"swh:1:rev:{run.commit}"  # Software Heritage's name of a git commit: its hash

    entities: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = file.relative_to(folder).as_posix()
        about = {"encodingFormat": _kind(path), "contentSize": str(file.stat().st_size), "name": path}
        if path == SNAKEFILE:
            kinds = ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"]
            entities[path] = crate.add(ComputationalWorkflow(crate, file, path, properties={"@type": kinds, **about}))
        else:
            entities[path] = crate.add(File(crate, file, path, properties=about))
        if path == "README.md":
            entities[path]["about"] = root
    of_item = {}
    for item in run.items.values():
        if item.kept:
            of_item[item.path] = entities[item.kept]
            if item.sha256:
                entities[item.kept]["sha256"] = item.sha256
            entities[item.kept]["identifier"] = f"md5:{item.md5}"
            continue
        more = {"sha256": item.sha256} if item.sha256 else {}
        more |= {} if item.size is None else {"contentSize": str(item.size)}
        of_item[item.path] = add(
            f"#{item.path}",
            "CreativeWork",
            name=item.path,
            identifier=f"md5:{item.md5}",
            description="Not in this crate: named by its md5, as DVC computes it, and its path in the project.",
            **more,
        )

    tools = {
        tool: add(
            f"#{tool}",
            "SoftwareApplication",
            name=f"python -m {tool}",
            softwareVersion=run.commit or project["version"],
        )
        for tool in dict.fromkeys(step.tool for step in run.steps)
    }
    actions = {step.address: _action(step, add, tools, of_item) for step in run.steps}
    root["mentions"] = list(actions.values())
    if not run.is_record:
        _workflow(run, crate, add, tools, actions, of_item, project["version"])
    crate.metadata.write(folder)
    crate.preview.write(folder)


def _action(step: Step, add: Any, tools: dict[str, Any], of_item: dict[str, Any]) -> Any:
    return add(
        f"#run-{step.address}",
        "CreateAction",
        name=step.address,
        description=step.command,
        instrument=tools[step.tool],
        object=[of_item[path] for path in step.inputs],
        result=[of_item[path] for path in step.outputs],
        actionStatus=_DONE,
    )


def _workflow(
    run: Run,
    crate: Any,
    add: Any,
    tools: dict[str, Any],
    actions: dict[str, Any],
    of_item: dict[str, Any],
    own: str,
) -> None:
    """Add the workflow with its steps, and its execution: what the engine started, from which files to which."""
    from rocrate.model import ComputerLanguage

    language = ComputerLanguage(
        crate,
        "https://w3id.org/workflowhub/workflow-ro-crate#snakemake",
        {"name": "Snakemake", "identifier": {"@id": _TOOLS["snakemake"]}, "url": {"@id": _TOOLS["snakemake"]}},
    )
    workflow = crate.get(SNAKEFILE)
    crate.add(language)
    crate.mainEntity = workflow
    made = {path for step in run.steps for path in step.outputs}
    read = {path for step in run.steps for path in step.inputs}
    given = [path for path in run.items if path in read - made]
    ends = [path for path in run.items if path in made - read and run.items[path].kept]
    steps, controls = [], []
    for number, step in enumerate(run.steps, start=1):
        steps.append(
            add(
                f"#step-{step.address}",
                "HowToStep",
                name=step.address,
                position=str(number),
                workExample=tools[step.tool],
            )
        )
        controls.append(
            add(
                f"#control-{step.address}",
                "ControlAction",
                name=f"orchestration of {step.address}",
                instrument=steps[-1],
                object=actions[step.address],
            )
        )
    workflow["name"] = "The graph of dvc.yaml, run by Snakemake"
    workflow["programmingLanguage"] = language
    workflow["version"] = run.commit or own
    workflow["conformsTo"] = {"@id": "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"}
    crate.metadata["conformsTo"] = [{"@id": at} for at in (crate.metadata.profile, *WORKFLOW_CRATE.values())]
    workflow["step"] = steps
    workflow["hasPart"] = list(tools.values())
    workflow["input"] = [_parameter(path, of_item[path], add) for path in given]
    workflow["output"] = [_parameter(path, of_item[path], add) for path in ends]
    engine = add(
        "#snakemake",
        "SoftwareApplication",
        name="Snakemake",
        url=_TOOLS["snakemake"],
        softwareVersion=version("snakemake"),
    )
    execution = add(
        "#run",
        "CreateAction",
        name=run.title,
        description="all steps of the graph",
        instrument=workflow,
        object=[of_item[path] for path in given],
        result=[of_item[path] for path in ends],
        actionStatus=_DONE,
    )
    add("#engine", "OrganizeAction", name="The engine's part", instrument=engine, object=controls, result=execution)
    crate.root_dataset["mentions"] = [execution, *actions.values()]


def _parameter(path: str, entity: Any, add: Any) -> Any:
    found = add(
        f"#parameter-{path}",
        "FormalParameter",
        name=path,
        additionalType="File",
        conformsTo={"@id": "https://bioschemas.org/profiles/FormalParameter/1.0-RELEASE"},
        workExample=entity,
    )
    entity["exampleOfWork"] = found
    return found


def _compact(value: Any) -> Any:
    """Return the one element of a list with one: RO-Crate wants no other form of it."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _kind(path: str) -> str:
    suffix = Path(path).suffix
    return _KINDS.get(suffix) or mimetypes.types_map.get(suffix, "application/octet-stream")


def _name(author: dict[str, str]) -> str:
    return author.get("name") or f"{author['given-names']} {author['family-names']}"
