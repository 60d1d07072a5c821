"""What summary.json says of an account."""

from typing import Any

from pneumo.study.account import TERMS, Account
from pneumo.study.replay import WhatIf
from pneumo.study.scaling import Pop, pop
from pneumo.study.schema import Compared, Efficiencies, Losses, Replayed


def of_training(account: Account | None) -> dict[str, Any]:
    """The fields of a row that its training's account fills."""
    if account is None:
        return {
            "lost_rank_s": None,
            "loss": dict.fromkeys(TERMS),
            "residual_rank_s": None,
            "residual_fraction": None,
            "late": [],
        }
    replayed, found = account.what_if, pop(account)
    return _losses(account) | {
        "what_if": None if replayed is None else _replayed(replayed),
        "pop": None if found is None else _efficiencies(found),
    }


def of_kind(account: Account) -> Losses:
    """The account of rows of another kind than training."""
    return Losses(**_losses(account))


def _losses(account: Account) -> dict[str, Any]:
    """N*T_N - T_1 in rank-seconds over the blocks that both have, T_1 for as many images, and what explains it."""
    residual, whole = account.total("residual"), account.whole_s
    steps = int(account.traffic.steps.sum())
    return {
        "lost_rank_s": account.total("lost"),
        "loss": {term: account.total(term) for term in TERMS},
        "items": {
            term: {name: float(values.sum()) for name, values in parts.items()} for term, parts in account.items.items()
        },
        "residual_rank_s": residual,
        "residual_fraction": None if residual is None else residual / whole,
        "late": account.late,
        "compared": Compared(blocks=list(account.blocks), steps=steps, whole_rank_s=whole),
    }


def _replayed(found: WhatIf) -> Replayed:
    return Replayed(recorded_s=found.recorded_s, replayed_s=found.replayed_s, scenarios_s=found.scenarios_s)


def _efficiencies(found: Pop) -> Efficiencies:
    return Efficiencies(**{name: getattr(found, name) for name in Efficiencies.__struct_fields__})
