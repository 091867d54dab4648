"""What each figure is about, in the identifiers of MITRE ATLAS and of NIST AI 100-2 E2025."""

from __future__ import annotations

ATLAS, NIST = "MITRE ATLAS", "NIST AI 100-2 E2025"
BLACK_BOX = f"{NIST} NISTAML.025 Black-box Evasion"
# By the name of the figure in a report.
IDENTIFIERS = {
    "transfer": [f"{ATLAS} AML.T0043.002 Black-Box Transfer", BLACK_BOX],
    "queries": [f"{ATLAS} AML.T0043.001 Black-Box Optimization", BLACK_BOX],
    "white_box": [
        f"{ATLAS} AML.T0043.000 White-Box Optimization",
        f"{NIST} NISTAML.022 Evasion",
    ],
    "substitute": [
        f"{ATLAS} AML.T0024.002 Extract AI Model",
        f"{NIST} NISTAML.031 Model Extraction",
    ],
}
