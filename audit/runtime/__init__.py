"""The run-time isolation auditor: its own books, checked at every step."""
