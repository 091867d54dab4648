"""Help of commands with many options: the options in panels, by what they are about."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

# By the parameters' names. Options that no panel names come last, with --help.
PANELS = {
    "Data": (
        *("data", "list_skipped", "images", "foreign", "labels", "layout", "pixel_max"),
        *("mean", "std", "channels", "outputs"),
    ),
    "Method": (
        *("recipe", "set_", "members", "start", "sources", "budget", "seed"),
        *("preset", "run", "checkpoint", "surrogates", "eps", "norm", "against"),
    ),
    "Live service": ("url", "requests", "rate"),
    "Demand": ("min_accuracy", "at_eps", "threat"),
    "Hardware": ("device",),
    "Output": ("out", "resume", "dry_run", "junit", "bom", "tracking_uri", "experiment"),
}


class InPanels(TyperCommand):
    """A command whose help shows its options in panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each panel's options, then the others."""
        panels: dict[str, list[tuple[str, str]]] = {
            title: [] for title in ("Arguments", *PANELS, "Other")
        }
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                panel = "Arguments"
            else:
                named = (title for title, names in PANELS.items() if parameter.name in names)
                panel = next(named, "Other")
            panels[panel].append(record)
        for title, records in panels.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
