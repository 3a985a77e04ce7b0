"""Used by every process of the pipeline: command line, signals, progress, DVC's checksums."""
