# The graph of dvc.yaml, in parallel: one rule for each stage of DVC's index, none known here by name.
#
#   snakemake --cores 8                          everything
#   snakemake --cores 8 results/voc_table.csv    what this one file needs
#
# profiles/default/config.yaml sets the options.
from pipeline import graph
from pipeline.engine import Engine

engine = Engine(workflow)
stages = engine.stages


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
        threads: stage.cores(workflow.resource_settings.cores or 1)
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
    engine.on_start()


onsuccess:
    engine.on_end()


onerror:
    engine.on_end()
