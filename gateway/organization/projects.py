"""/v1/organization/projects: a tenant's projects, their keys and their rate limits.

A key that may administrate makes keys for inference only, and never shows a secret twice. OpenAI's service account is
our key: creating one is how its client gets a new secret.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.requests import Request

from gateway.api.auth import INFERENCE_SCOPE, Caller
from gateway.api.problems import InvalidRequestError, NotThereError
from gateway.organization.desk import NS, PAGE_DEFAULT, PAGE_MAX, Desk, body_of, listing, page_of
from gateway.organization.query import Query
from tenancy.access.directory import DuplicateNameError, Project, list_projects
from tenancy.access.keys import ApiKey, list_keys
from tenancy.ids import InvalidNameError
from tenancy.quotas.limits import PER_MINUTE_MAX, ScopeLimits, get_limits

EXPIRES_SECONDS_MAX = 10 * 366 * 86_400
PROJECTS_MAX = 1_000

Name = Annotated[str, Meta(min_length=1, max_length=100)]
PerMinute = Annotated[int, Meta(ge=0, le=PER_MINUTE_MAX)]


class NewProject(Struct, frozen=True, forbid_unknown_fields=True):
    name: Name


class NewAccount(Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    create_service_account_only: bool | None = None
    expires_in_seconds: Annotated[int, Meta(ge=1, le=EXPIRES_SECONDS_MAX)] | None = None


class NewLimits(Struct, frozen=True, forbid_unknown_fields=True):
    max_requests_per_1_minute: PerMinute | None = None
    max_tokens_per_1_minute: PerMinute | None = None


class ProjectDesk(Desk):
    async def page(self, request: Request, caller: Caller) -> Any:
        query = Query(request.query_params)
        query.text("include_archived", ("true", "false"))  # there are none
        after, limit = query.text("after"), query.number("limit", PAGE_DEFAULT, 1, PAGE_MAX)
        query.end()
        projects = sorted(await self._projects(caller), key=lambda one: (one.created_ns, one.project_id))
        page, more = page_of(projects, lambda one: one.project_id, after, limit)
        return listing([_project(one) for one in page], more)

    async def create(self, request: Request, caller: Caller) -> Any:
        wanted = await body_of(request, NewProject)
        if len(await self._projects(caller)) >= PROJECTS_MAX:
            raise InvalidRequestError(f"there are {PROJECTS_MAX} projects already", "name")
        try:
            async with self.services.database.transaction(caller.principal.tenant_id) as conn:
                made = await self.clerk(conn).create_project(caller.principal.tenant_id, wanted.name)
        except (DuplicateNameError, InvalidNameError) as error:
            raise InvalidRequestError(str(error), "name") from error
        return _project(made)

    async def one(self, request: Request, caller: Caller) -> Any:
        return _project(await self._own(request, caller))

    async def keys(self, request: Request, caller: Caller) -> Any:
        query = Query(request.query_params)
        after, limit = query.text("after"), query.number("limit", PAGE_DEFAULT, 1, PAGE_MAX)
        query.text("owner_project_access", ("active", "any"))  # every owner is active
        query.end()
        page, more = page_of(await self._live_keys(request, caller), lambda one: one.key_id, after, limit)
        return listing([_key(one) for one in page], more)

    async def key(self, request: Request, caller: Caller) -> Any:
        return _key(await self._own_key(request, caller))

    async def revoke_key(self, request: Request, caller: Caller) -> Any:
        key = await self._own_key(request, caller)
        reason = f"deleted with key {caller.principal.key_id}"
        async with self.services.database.transaction(caller.principal.tenant_id) as conn:
            await self.clerk(conn).revoke_key(caller.principal.tenant_id, key.key_id, reason)
        return {"object": "organization.project.api_key.deleted", "id": key.key_id, "deleted": True}

    async def create_account(self, request: Request, caller: Caller) -> Any:
        project = await self._own(request, caller)
        wanted = await body_of(request, NewAccount)
        if wanted.create_service_account_only:
            raise InvalidRequestError("a service account here is its key", "create_service_account_only")
        now_ns = self.services.world.now_ns()
        expires_ns = now_ns + wanted.expires_in_seconds * NS if wanted.expires_in_seconds else None
        try:
            async with self.services.database.transaction(caller.principal.tenant_id) as conn:
                minted = await self.clerk(conn).create_key(
                    caller.principal.tenant_id,
                    project.project_id,
                    wanted.name,
                    self.services.secrets.key_pepper,
                    scopes=frozenset({INFERENCE_SCOPE}),
                    expires_ns=expires_ns,
                    rules=caller.principal.rules,  # a key cannot make one that may do more than itself
                )
        except InvalidNameError as error:
            raise InvalidRequestError(str(error), "name") from error
        created = now_ns // NS
        return {
            "object": "organization.project.service_account",
            "id": minted.key_id,
            "name": wanted.name,
            "role": "member",
            "created_at": created,
            "api_key": {
                "object": "organization.project.service_account.api_key",
                "id": minted.key_id,
                "name": wanted.name,
                "created_at": created,
                "value": minted.secret_text,
                "expires_at": None if expires_ns is None else expires_ns // NS,
            },
        }

    async def limits(self, request: Request, caller: Caller) -> Any:
        project = await self._own(request, caller)
        query = Query(request.query_params)
        after, before = query.text("after"), query.text("before")
        query.number("limit", PAGE_MAX, 0, PAGE_MAX)
        query.end()
        if after or before:
            raise NotThereError("cursor", after or before)  # there is one page
        return listing([_limits(project, await self._limits_of(project))], False)

    async def set_limits(self, request: Request, caller: Caller) -> Any:
        project = await self._own(request, caller)
        if request.path_params["rate_limit_id"] != _limit_id(project):
            raise NotThereError("rate limit", request.path_params["rate_limit_id"])
        wanted = await body_of(request, NewLimits)
        async with self.services.database.transaction(caller.principal.tenant_id) as conn:
            found = (await get_limits(conn, [project.project_id])).get(
                project.project_id, ScopeLimits(project.project_id)
            )
            await self.clerk(conn).set_limits(
                "project",
                project.project_id,
                _new(wanted.max_requests_per_1_minute, found.requests_per_minute),
                _new(wanted.max_tokens_per_1_minute, found.tokens_per_minute),
                found.concurrency_max,
                tokens_per_day=found.tokens_per_day,
                shadow=found.shadow,
            )
        return _limits(project, await self._limits_of(project))

    async def _limits_of(self, project: Project) -> ScopeLimits:
        async with self.services.database.read(project.tenant_id) as conn:
            found = await get_limits(conn, [project.project_id])
        return found.get(project.project_id, ScopeLimits(project.project_id))

    async def _projects(self, caller: Caller) -> list[Project]:
        async with self.services.database.read(caller.principal.tenant_id) as conn:
            return await list_projects(conn, caller.principal.tenant_id)

    async def _own(self, request: Request, caller: Caller) -> Project:
        """Raises NotThereError."""
        project_id = request.path_params["project_id"]
        for project in await self._projects(caller):
            if project.project_id == project_id:
                return project
        raise NotThereError("project", project_id)

    async def _live_keys(self, request: Request, caller: Caller) -> list[ApiKey]:
        project = await self._own(request, caller)
        async with self.services.database.read(caller.principal.tenant_id) as conn:
            keys = await list_keys(conn, caller.principal.tenant_id)
        return [key for key in keys if key.project_id == project.project_id and key.revoked_ns is None]

    async def _own_key(self, request: Request, caller: Caller) -> ApiKey:
        """Raises NotThereError."""
        key_id = request.path_params["key_id"]
        for key in await self._live_keys(request, caller):
            if key.key_id == key_id:
                return key
        raise NotThereError("API key", key_id)


def _new(wanted: int | None, present: int | None) -> int | None:
    """A limit that was not named stays; the largest that there is stands for none."""
    if wanted is None:
        return present
    return None if wanted == PER_MINUTE_MAX else wanted


def _project(project: Project) -> dict[str, Any]:
    return {
        "object": "organization.project",
        "id": project.project_id,
        "name": project.name,
        "created_at": project.created_ns // NS,
        "archived_at": None,
        "status": "active",
    }


def _key(key: ApiKey) -> dict[str, Any]:
    account = {"id": key.key_id, "name": key.name, "role": "member", "created_at": key.created_ns // NS}
    return {
        "object": "organization.project.api_key",
        "id": key.key_id,
        "name": key.name,
        "redacted_value": f"bk-{key.public_id}-***",
        "created_at": key.created_ns // NS,
        "last_used_at": None if key.last_used_ns is None else key.last_used_ns // NS,
        "expires_at": None if key.expires_ns is None else key.expires_ns // NS,
        "owner": {"type": "service_account", "service_account": account},
        "owner_project_access": "active",
        "scopes": sorted(key.scopes),
    }


def _limits(project: Project, limits: ScopeLimits) -> dict[str, Any]:
    """OpenAI has one for each model; ours are for all of a project's requests."""
    return {
        "object": "project.rate_limit",
        "id": _limit_id(project),
        "model": "*",
        "max_requests_per_1_minute": _shown(limits.requests_per_minute),
        "max_tokens_per_1_minute": _shown(limits.tokens_per_minute),
    }


def _limit_id(project: Project) -> str:
    return f"rl_{project.project_id}"


def _shown(limit: int | None) -> int:
    return PER_MINUTE_MAX if limit is None else limit
