"""Looks at a run afterwards: its analysis, the doctor's diagnosis, and the pages report.html and report.md."""
