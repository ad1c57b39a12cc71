"""From what the black-box probes saw to a verdict: `leak`, `pass`, or `inconclusive` with the reason.

1. A leak that needs no statistics (a marker, a foreign id, a count) is a leak.
2. Every other sign of one is a p value; all of a run's p values are corrected together (Holm), controls and the proofs
   of absence are not among them.
3. Nothing is called absent by a probe whose positive control failed, or that could not show absence: a server whose
   cache cannot be seen at all is not thereby a server that does not share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from statistics import median
from typing import Literal

from audit.probes.probe_statistics import equivalence_p, holm, kolmogorov_smirnov_p, rate_bound, signed_rank_p

ALPHA = 0.01
MARGIN = 0.25  # of what a tenant's own hit saves: less than this between the arms is called the same

Verdict = Literal["pass", "leak", "inconclusive"]
Figures = dict[str, float | int]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one probe saw. ``exact``: leaks that need no statistics. ``lacking``: why nothing may be called absent,
    empty where it may. ``shown``: what was shown then."""

    probe: str
    exact: tuple[str, ...] = ()
    p_values: dict[str, float] = field(default_factory=dict)
    lacking: str = ""
    shown: str = ""
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    probe: str
    verdict: Verdict
    why: str
    p_values: dict[str, float]  # corrected
    figures: Figures


@dataclass(frozen=True, slots=True)
class Arms:
    """One round's three times to the first token, in milliseconds, and the cached tokens that the server told (-1:
    none told): the asker's own prefix again, a prefix that only the other tenant had sent, one that nobody had."""

    own_ms: float
    other_ms: float
    fresh_ms: float
    own_cached: int = -1
    other_cached: int = -1
    fresh_cached: int = -1


def seen_in_arms(probe: str, rounds: Sequence[Arms], alpha: float = ALPHA) -> Seen:
    """Prefix sharing, by time and by count."""
    if not rounds:
        return Seen(probe, lacking="no round was finished")
    saved_by_own = [arms.fresh_ms - arms.own_ms for arms in rounds]
    saved_by_other = [arms.fresh_ms - arms.other_ms for arms in rounds]
    exact = tuple(
        f"{arms.other_cached} cached tokens were told for a prefix that only the other tenant had sent, "
        f"{arms.fresh_cached} for a fresh one"
        for arms in rounds
        if arms.other_cached > max(0, arms.fresh_cached)
    )
    saved, margin = median(saved_by_own), MARGIN * median(saved_by_own)
    control_p = signed_rank_p(saved_by_own)
    absence_p = equivalence_p(saved_by_other, margin) if margin > 0 else 1.0
    faster = median(saved_by_other) > 0
    lacking = ""
    if control_p >= alpha:
        lacking = f"even the same tenant's prefix was not faster the second time (p = {control_p:.3g}): no power"
    elif absence_p >= alpha:
        lacking = f"times differ too much to show that nothing is shared (p = {absence_p:.3g}): ask for more rounds"
    return Seen(
        probe,
        exact[:1],
        {
            "faster": signed_rank_p(saved_by_other),
            "other_times": kolmogorov_smirnov_p([a.other_ms for a in rounds], [a.fresh_ms for a in rounds])
            if faster
            else 1.0,
        },
        lacking,
        f"the other tenant's prefix saves less than {margin:.1f} ms; one's own saves {saved:.1f}",
        {
            "num_rounds": len(rounds),
            "own_saves_ms": round(saved, 2),
            "other_saves_ms": round(median(saved_by_other), 2),
            "margin_ms": round(margin, 2),
            "control_p": control_p,
            "absence_p": absence_p,
        },
    )


def seen_of_canaries(num_listened: int, num_own_seen: int, leaks: Sequence[str]) -> Seen:
    """Markers of one tenant in what the other was given. ``num_own_seen``: how often the first got its own back."""
    bound = rate_bound(num_listened)
    lacking = "" if num_own_seen else "the model never repeated a marker to its own tenant: a leak would not show"
    return Seen(
        "canary",
        tuple(leaks[:3]),
        {},
        lacking if num_listened else "nobody listened",
        f"no marker in {num_listened} answers to the other tenant: with 95 % confidence less than {bound:.1%} have one",
        {"num_answers": num_listened, "num_own_seen": num_own_seen, "num_leaks": len(leaks), "rate_bound": bound},
    )


@dataclass(frozen=True, slots=True)
class Company:
    """One question's answers: alone, and while the other tenant says the one thing or the other, of equal lengths."""

    alone: tuple[str, ...]
    beside_one: tuple[str, ...]
    beside_other: tuple[str, ...]


def seen_in_company(questions: Sequence[Company]) -> Seen:
    """Whether an answer depends on what others say, or at least on there being others."""
    if not questions:
        return Seen("invariance", lacking="no question was finished")
    repeats = all(len(set(one.alone)) == 1 for one in questions)
    in_company = [(one.alone[0], answer) for one in questions for answer in (*one.beside_one, *one.beside_other)]
    num_other = sum(alone != answer for alone, answer in in_company)
    p_values = {} if not num_other else {"exchanged": exchange_p(questions)}
    lacking = ""
    if not repeats:
        lacking = "the same question alone has different answers: nothing can be compared"
    elif num_other:
        lacking = (
            f"{num_other} of {len(in_company)} answers change in company: this server's numbers depend on its batch, "
            "which is not in itself a leak, and hides one"
        )
    return Seen(
        "invariance",
        (),
        p_values,
        lacking,
        f"all {len(in_company)} answers in company are those of the same question alone, to the last digit told",
        {"num_questions": len(questions), "num_answers": len(in_company), "num_other": num_other},
    )


def exchange_p(questions: Sequence[Company]) -> float:
    """p that answers do not tell which company they were given in: over all ways to exchange the two labels within
    each question, of how often answers under one label agree. The smallest of the questions', times their number."""
    return min(1.0, len(questions) * min(_exchange_p(one) for one in questions))


def _exchange_p(question: Company) -> float:
    answers = question.beside_one + question.beside_other
    size = len(question.beside_one)

    def agreement(chosen: tuple[int, ...]) -> int:
        groups = [chosen, tuple(i for i in range(len(answers)) if i not in chosen)]
        return sum(answers[i] == answers[j] for group in groups for i, j in combinations(group, 2))

    seen = agreement(tuple(range(size)))
    ways = combinations(range(len(answers)), size)
    return sum(agreement(chosen) >= seen for chosen in ways) / comb(len(answers), size)


def conclude(seen: Sequence[Seen], alpha: float = ALPHA) -> list[Finding]:
    """One finding for each probe, p values corrected over all of them."""
    names = [(index, name) for index, one in enumerate(seen) for name in one.p_values]
    corrected = dict(zip(names, holm([seen[index].p_values[name] for index, name in names]), strict=True))
    findings = []
    for index, one in enumerate(seen):
        p_values = {name: corrected[index, name] for name in one.p_values}
        significant = {name: p for name, p in p_values.items() if p < alpha}
        verdict: Verdict
        if one.exact:
            verdict, why = "leak", "; ".join(one.exact)
        elif significant:
            told = ", ".join(f"{name}: p = {p:.3g}" for name, p in significant.items())
            verdict, why = "leak", f"the difference is no chance ({told})"
        elif one.lacking:
            verdict, why = "inconclusive", one.lacking
        else:
            verdict, why = "pass", one.shown
        findings.append(Finding(one.probe, verdict, why, p_values, one.figures))
    return findings


def overall(findings: Sequence[Finding]) -> Verdict:
    verdicts = {finding.verdict for finding in findings}
    if "leak" in verdicts:
        return "leak"
    return "pass" if verdicts == {"pass"} else "inconclusive"
