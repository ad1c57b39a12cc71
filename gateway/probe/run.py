"""All probes, one after the other, within one bound of time. One that cannot end is inconclusive and says why."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from audit.probes.probe_verdict import Arms, Finding, Seen, conclude, seen_in_arms
from gateway.probe.canary import listen
from gateway.probe.client import Client, Endpoint, OutOfTimeError
from gateway.probe.client import ProbeError as ProbeError  # what a run raises
from gateway.probe.company import questions_in_company
from gateway.probe.names import names_taken, same_idempotency_key
from gateway.probe.prefix import rounds_of_arms
from gateway.probe.scope import ids_in_scope
from gateway.probe.words import Entropy

PROBES = ("prefix", "names", "canary", "invariance", "id scope", "idempotency key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked of the server; written into the result, so that it says what it rests on."""

    probes: tuple[str, ...] = PROBES
    rounds: int = 14
    words: int = 300  # of a prefix
    answers: int = 40  # canary: of each tenant
    questions: int = 4  # invariance
    each: int = 4  # of a question under each of two loads
    seconds: float = 600.0


def run_probes(
    url: str,
    key_a: str,
    key_b: str,
    *,
    ca: Path | None,
    plan: Plan,
    entropy: Entropy,
    model: str = "",
    progress: Callable[[str], None] = lambda line: None,
) -> list[Finding]:
    """Raises ProbeError where the server is not there, or does not serve both keys."""
    endpoint = Endpoint(url, ca, plan.seconds)
    a, b = Client(endpoint, key_a, model), Client(endpoint, key_b, model)
    try:
        if not model:
            b.model = a.find_model()
        for client in (a, b):
            client.said("Hi", max_tokens=1)
        return conclude([_seen(probe, a, b, plan, entropy, progress) for probe in plan.probes])
    finally:
        a.close()
        b.close()


def _seen(probe: str, a: Client, b: Client, plan: Plan, entropy: Entropy, progress: Callable[[str], None]) -> Seen:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        progress(f"{probe}: {count}")

    progress(probe)
    arms: list[Arms] = []
    try:
        if probe in ("prefix", "names"):
            fields = names_taken(b) if probe == "names" else {}
            for one in rounds_of_arms(a, b, entropy, num_rounds=plan.rounds, num_words=plan.words, **fields):
                arms.append(one)
                step()
            return seen_in_arms(probe, arms)
        if probe == "canary":
            return listen(a, b, entropy, num_answers=plan.answers, step=step)
        if probe == "invariance":
            return questions_in_company(a, b, entropy, num_questions=plan.questions, num_each=plan.each, step=step)
        if probe == "id scope":
            return ids_in_scope(a, b, entropy, step)
        return same_idempotency_key(a, b, entropy)
    except OutOfTimeError:
        return Seen(probe, lacking=f"the {plan.seconds:g} seconds of this run were over")
    except ProbeError as error:
        return Seen(probe, lacking=str(error))
