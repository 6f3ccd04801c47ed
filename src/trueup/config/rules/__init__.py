"""What cannot be meant together: keys that exclude or need each other, keys that are missing.

A module a subject. `RULES` are a training's; the other verbs take from the subjects what they share with it.
"""

from __future__ import annotations

from trueup.config.rules import data, model, objective, online, optimizers, train, tuning

RULES = [
    *tuning.RULES,
    *objective.RULES,
    *online.RULES,
    *model.RULES,
    *optimizers.RULES,
    *train.RULES,
    *data.RULES,
]
