"""What every process of the pipeline needs: command line, signals, progress, checksums as DVC's."""
