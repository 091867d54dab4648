"""The report as a page, plots, evidence and other tools' formats."""
