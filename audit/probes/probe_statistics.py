"""The tests behind the black-box probes: exact where they can be, without assumptions about how times are distributed.

- `signed_rank_p`: Wilcoxon's signed-rank test (Biometrics Bulletin 1, 1945), exact over all signs: each difference is
  as likely positive as negative if the two arms of a round are alike. It is the permutation test within rounds, on
  ranks, so that one slow request decides nothing.
- `kolmogorov_smirnov_p`: the two-sample test on the whole distributions, exact by counting lattice paths (Hodges,
  Arkiv för Matematik 3, 1958).
- `equivalence_p`: two one-sided tests (Schuirmann, 1987) with the signed-rank test: small where the arms differ by less
  than a margin. Absence is claimed with this one only, never with a large p of the others.
- `holm`: Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979).
"""

import math
from collections.abc import Sequence

NUM_PAIRS_MAX = 200  # the exact distribution takes the cube of this many additions


def signed_rank_p(differences: Sequence[float]) -> float:
    """One-sided p that ``differences`` lie around 0 or below, against: above. 1.0 where there is nothing to rank.

    Zeros are left out, equal sizes share their mean rank. Raises ValueError for more than NUM_PAIRS_MAX.
    """
    if len(differences) > NUM_PAIRS_MAX:
        raise ValueError(f"at most {NUM_PAIRS_MAX} pairs, not {len(differences)}")
    ordered = sorted((difference for difference in differences if difference), key=abs)
    ranks = _doubled_ranks([abs(difference) for difference in ordered])
    positive = sum(rank for rank, difference in zip(ranks, ordered, strict=True) if difference > 0)
    ways = [1] + [0] * sum(ranks)  # ways[s]: choices of signs whose positive ranks add up to s
    reached = 0
    for rank in ranks:
        for total in range(reached, -1, -1):
            if ways[total]:
                ways[total + rank] += ways[total]
        reached += rank
    return _ratio(sum(ways[positive:]), 2 ** len(ranks))


def _doubled_ranks(sizes: Sequence[float]) -> list[int]:
    """Of sizes in order, from 1, times two, so that a mean rank is an integer."""
    ranks: list[int] = []
    while len(ranks) < len(sizes):
        first = len(ranks)
        last = first
        while last + 1 < len(sizes) and sizes[last + 1] == sizes[first]:
            last += 1
        ranks += [first + 1 + last + 1] * (last + 1 - first)
    return ranks


def kolmogorov_smirnov_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p that both samples come from one distribution. Exact without ties, an upper bound with them."""
    n, m = len(first), len(second)
    if not n or not m:
        return 1.0
    gap = _largest_gap(first, second)
    if not gap:
        return 1.0
    # Orders of all n + m values are paths from (0, 0) to (n, m); count those that stay nearer than the gap.
    row = [0] * (m + 1)
    for i in range(n + 1):
        for j in range(m + 1):
            if abs(i * m - j * n) >= gap:
                row[j] = 0
            elif i == j == 0:
                row[j] = 1
            else:
                row[j] = (row[j] if i else 0) + (row[j - 1] if j else 0)
    return _ratio(math.comb(n + m, n) - row[m], math.comb(n + m, n))


def _largest_gap(first: Sequence[float], second: Sequence[float]) -> int:
    """Between the two cumulative counts, times n * m so that it is an integer."""
    n, m = len(first), len(second)
    ours, theirs = sorted(first), sorted(second)
    gap = i = j = 0
    while i < n and j < m:
        value = min(ours[i], theirs[j])
        while i < n and ours[i] == value:
            i += 1
        while j < m and theirs[j] == value:
            j += 1
        gap = max(gap, abs(i * m - j * n))
    return gap


def equivalence_p(differences: Sequence[float], margin: float) -> float:
    """p that ``differences`` lie ``margin`` or more away from 0, against: nearer."""
    above = signed_rank_p([difference + margin for difference in differences])
    below = signed_rank_p([margin - difference for difference in differences])
    return max(above, below)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that the chance of any false alarm among all of them is what one of them alone would have."""
    adjusted = [1.0] * len(p_values)
    worst = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, p_values[index] * (len(p_values) - place)))
        adjusted[index] = worst
    return adjusted


def rate_bound(num_trials: int, confidence: float = 0.95) -> float:
    """The largest rate that is likely after no hit in ``num_trials`` (Clopper-Pearson): about 3 / n."""
    return 1 - (1 - confidence) ** (1 / num_trials) if num_trials else 1.0


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole < 2**900 else math.exp(math.log(part) - math.log(whole)) if part else 0.0
