"""Source models: networks whose attacks the model has learnt from, which are no surrogates."""

from __future__ import annotations

from collections.abc import Sequence

from dverge_serve.engine.card import Card
from dverge_serve.errors import UserError
from verification.surrogate import Surrogate


def refuse_sources(surrogates: Sequence[Surrogate], card: Card) -> None:
    """Refuse surrogates from whose adversarial images the model has learnt.

    What resists them says nothing of attacks that transfer from networks it has not met.

    Raises:
        UserError: one of their networks is a source of the model's training.
    """
    known = {each["sha256"]: each["name"] for each in card.training.get("source_models", [])}
    for each in surrogates:
        if met := sorted(known[digest] for digest in each.networks & known.keys()):
            raise UserError(
                f"the surrogate {each.name} has networks that the model was trained against "
                f"({met[0]})",
                "networks it has not met",
                "leave it out of `surrogates`",
            )
