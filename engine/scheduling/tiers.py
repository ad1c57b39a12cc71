"""Service tiers: which sequences come before which, above every policy.

A tier is a small integer on the wire (Submit.priority); the larger goes first. Inside the scheduler a sequence has a
``rank``: its tier, or RESCUED once it has waited too long (engine/scheduling/rescue.py).
"""

TIERS = {"priority": 1, "default": 0, "flex": -1, "batch": -2}
BATCH = TIERS["batch"]  # takes only what all others leave
RESCUED = 2  # above every tier, until the sequence ends
RANKS = (RESCUED, *sorted(TIERS.values(), reverse=True))  # in the order in which they are served
