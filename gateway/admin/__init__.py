"""The admin page: what each tenant used, owes, holds and may use, and whether the isolation audit is awake.

Mount it with ``routes=[*admin_routes(services), ...]``. Every path below /admin belongs to this package.
"""

from gateway.admin.routes import admin_routes

__all__ = ["admin_routes"]
