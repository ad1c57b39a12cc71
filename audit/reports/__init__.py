"""Compliance reports: figures from the log, their wording, their signature."""
