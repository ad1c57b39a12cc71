"""Invoices as files, the books compared with each other, and what the engine's time went into."""
