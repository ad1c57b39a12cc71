"""engine/bench with the isolation auditor watching, as in the worker: what the audit costs."""

from engine.bench.__main__ import main
from gateway.audit_observer import observer_of

if __name__ == "__main__":
    main(observer_of)
