"""report.html and report.md of a run: what its folder says (record), what follows (story), how it is shown."""
