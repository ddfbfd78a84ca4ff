"""What a run says while it runs: metrics, tables and files, to any Lightning loggers."""
