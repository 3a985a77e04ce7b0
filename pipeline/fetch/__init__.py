"""Archives onto this machine: local copies, downloads that resume, checksums, a user's own folders."""
