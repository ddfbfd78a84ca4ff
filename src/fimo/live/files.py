"""Names of the files that a run's log writes, whatever its loggers are."""

METRICS = "metrics.csv"
SUMMARY = "summary.json"
