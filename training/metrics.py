"""Prints docs/metrics.md, the table of every metric and event: `python -m training.metrics > docs/metrics.md`."""

from training.record.metric_schema import schema

if __name__ == "__main__":
    print(schema(), end="")
