"""What people ask of MLflow's database: `python -m pipeline.tracking ui | find`."""

from __future__ import annotations

import sys

from pipeline.runtime.cli import run_cli
from pipeline.tracking.database import main

if __name__ == "__main__":
    sys.exit(run_cli(main))
