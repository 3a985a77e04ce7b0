"""Several processes for one training: torchrun from inside the stage, so that its command does not change."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

from pipeline.runtime.cli import EXIT_TRY_AGAIN, Terminated


def together(module: str, name: str, processes: int, device: str) -> None:
    """Run `python -m <module> <name>` in several processes of one process group; return when all are done.

    Args:
        module: the stage.
        name: its argument.
        processes: how many.
        device: "cuda": each has a GPU of its own.

    Raises:
        Terminated: they were asked to stop (SIGTERM).
        KeyboardInterrupt: Ctrl-C.
        SystemExit: one failed and has printed why, or was killed, which is printed here; with its exit code.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from refinenet.device import reserve

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes print their own errors
    if device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = reserve(processes)
    os.environ["PIPELINE_ENGINE"] = str(os.getpid())  # they end with this process, however that ends
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, name)
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise Terminated(f"{processes} processes; the same command goes on from checkpoints/{name}/") from None
    except ChildFailedError as failed:
        codes = {failure.exitcode for failure in failed.failures.values()}
        if EXIT_TRY_AGAIN in codes:
            raise Terminated(f"{processes} processes; the same command goes on from checkpoints/{name}/") from None
        # The others end with an error of the network, in which nothing says what has happened.
        killed = [(failure.timestamp, rank, failure.exitcode) for rank, failure in failed.failures.items()]
        for _, rank, code in sorted(one for one in killed if one[2] < 0 and one[2] != -signal.SIGTERM)[:1]:
            print(
                f"error: process {rank} of {processes} was ended by {signal.Signals(-code).name}; "
                f"the same command goes on from checkpoints/{name}/",
                file=sys.stderr,
            )
        sys.exit(max(codes) if max(codes) > 0 else 1)
