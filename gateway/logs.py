"""Logs: JSON lines on standard error, lengths and ids only. Nobody logs a prompt, an answer or a secret."""

import logging
import sys

import structlog


def configure_logs(level: str) -> None:
    """Send structlog's events to standard error from `level` ("debug" ... "error") on."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
