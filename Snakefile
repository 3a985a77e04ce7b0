# The graph of dvc.yaml, in parallel: one rule for each stage of DVC's index, none known here by name.
#
#   snakemake --cores 8                          everything
#   snakemake --cores 8 results/voc_table.csv    what this one file needs
#
# profiles/default/config.yaml sets the options.
import sys

from dvc.repo import Repo
from filelock import FileLock, Timeout

from pipeline import graph
from refinenet.errors import UserError

repo = Repo(".")
graph.register_engine()
try:
    stages = graph.stages(repo)
    if workflow.is_main_process:
        # Of this process, so that a killed one leaves nothing behind that would have to be unlocked.
        only_one = FileLock(".snakemake/refinenet.lock")
        only_one.acquire(timeout=0)
        graph.sync_mtimes(repo, stages)
except UserError as error:
    sys.exit(f"error: {error}")
except Timeout:
    sys.exit("error: another snakemake is at work in this folder; wait for it, then again")


rule all:
    input:
        [output for stage in stages for output in stage.outputs],


for stage in stages:

    rule:
        name:
            stage.rule
        input:
            stage.inputs,
            stamp=str(stage.stamp),
        output:
            [directory(o) if graph.is_folder(o) else o for o in stage.outputs],
        log:
            f".snakemake/stages/{stage.rule}.log",
        threads: stage.cores(workflow.cores)
        resources:
            gpu=stage.gpus,
            mem_mb=stage.meta.get("memory", 1000),
            runtime=stage.meta.get("minutes", 10),
        params:
            command=stage.command,
            values=stage.params,
            done=str(stage.done),
            digest=stage.digest(),
        message:
            stage.command
        shell:
            "(export PIPELINE_CORES={threads}; {params.command}) 2>&1 | tee {log} >&2 && mkdir -p $(dirname {params.done}) && echo {params.digest} > {params.done}"


onstart:
    # `jobs` is for executors that hand jobs to other machines.
    elsewhere = workflow.resource_settings.nodes is not None
    graph.check_machine(stages, [job.rule.name for job in workflow.dag.needrun_jobs()], elsewhere)


onsuccess:
    graph.commit_or_exit(repo, stages)


onerror:
    graph.commit_or_exit(repo, stages)
