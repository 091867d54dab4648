"""The JSON Schema of the report, as it ships in the package."""

from __future__ import annotations

import json
from importlib import resources

REPORT_SCHEMA = json.loads(
    (resources.files("dverge_serve.engine") / "report.schema.json").read_text("utf-8")
)
