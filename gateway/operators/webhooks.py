"""Who is told of alerts, and what became of it."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from gateway.api.problems import InvalidRequestError
from gateway.operators.desk import Ask, Id, Nothing, Why
from gateway.operators.refusals import there
from gateway.organization.desk import listed
from gateway.records.plain import record
from gateway.webhooks.events import ALERT_KINDS, EVENT_KINDS, num_leaves
from gateway.webhooks.post import PostError, check_url
from gateway.webhooks.signature import endpoint_secret
from tenancy.webhooks import URL_CHARS_MAX, deliveries, endpoints, get_delivery, get_endpoint

DELIVERIES_MAX = 1_000  # the newest; pages are cut from them


class NewWebhook(Struct, frozen=True, forbid_unknown_fields=True):
    url: Annotated[str, Meta(min_length=1, max_length=URL_CHARS_MAX)]
    tenant_id: Id | None = None  # left out: everything
    kinds: Annotated[tuple[str, ...], Meta(max_length=100)] = ()  # empty: alerts


async def webhooks(ask: Ask) -> Any:
    page, more = ask.page(await endpoints(ask.conn), lambda one: one.endpoint_id)
    return listed([record(one) for one in page], [one.endpoint_id for one in page], more)


async def add(ask: Ask, wanted: NewWebhook) -> Any:
    """Shows the secret that the receiver verifies with, once."""
    kinds = frozenset(wanted.kinds or ALERT_KINDS)
    if unknown := sorted(kinds - EVENT_KINDS):
        raise InvalidRequestError(f"no event is called {unknown[0][:100]!r}", "kinds")
    try:
        check_url(wanted.url, private_allowed=ask.services.settings.webhook_private)
    except PostError as error:
        raise InvalidRequestError(str(error), "url") from error
    tenant_id = (await ask.tenant(wanted.tenant_id)).tenant_id if wanted.tenant_id else ""
    endpoint_id = await ask.clerk.add_webhook(
        wanted.url, kinds, tenant_id=tenant_id, next_leaf_index=await num_leaves(ask.conn)
    )
    secret = endpoint_secret(ask.services.secrets, endpoint_id)
    return record(await get_endpoint(ask.conn, endpoint_id)) | {"secret": secret}


async def remove(ask: Ask, why: Why) -> Any:
    endpoint_id = ask.path["endpoint_id"]
    with there():
        await get_endpoint(ask.conn, endpoint_id)
    await ask.clerk.remove_webhook(endpoint_id, why.reason or "removed by an operator")
    return record(await get_endpoint(ask.conn, endpoint_id))


async def sent(ask: Ask) -> Any:
    """The newest first; of one endpoint with its id as ``endpoint_id``."""
    only = ask.id_of("endpoint_id")
    if only:
        with there():
            await get_endpoint(ask.conn, only)
    found = await deliveries(ask.conn, endpoint_id=only, limit=DELIVERIES_MAX)
    page, more = ask.page(found, lambda one: one.delivery_id)
    return listed([record(one) for one in page], [one.delivery_id for one in page], more)


async def resend(ask: Ask, _: Nothing) -> Any:
    delivery_id = ask.path["delivery_id"]
    with there():
        await get_delivery(ask.conn, delivery_id)
    await ask.clerk.resend_webhook(delivery_id)
    return record(await get_delivery(ask.conn, delivery_id))


READING = (
    ("GET", "/webhooks", webhooks),
    ("GET", "/deliveries", sent),
)
WRITING: tuple[tuple[str, str, type[Struct], Any], ...] = (
    ("POST", "/webhooks", NewWebhook, add),
    ("POST", "/webhooks/{endpoint_id}/remove", Why, remove),
    ("POST", "/deliveries/{delivery_id}/resend", Nothing, resend),
)
