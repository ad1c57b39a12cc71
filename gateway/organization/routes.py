"""The routes below /v1/organization, in the shapes of OpenAI's administration API, so that its client's admin part
works: usage and money for keys with the scope `usage`, the log for `audit`, projects, keys and limits for `admin`. Of
money OpenAI has costs alone: balance, credits, budgets and invoices are ours.
"""

from starlette.routing import Route

from gateway.organization.audit_logs import AuditLogDesk
from gateway.organization.money import MoneyDesk
from gateway.organization.projects import ProjectDesk
from gateway.organization.usage import UsageDesk
from gateway.services import Services

ROOT = "/v1/organization"
PROJECT = ROOT + "/projects/{project_id}"


def organization_routes(services: Services) -> list[Route]:
    usage, projects, log = UsageDesk(services), ProjectDesk(services), AuditLogDesk(services)
    money, invoice = MoneyDesk(services), ROOT + "/invoices/{invoice_id}"
    table = (
        ("GET", ROOT + "/usage/completions", usage.open_to("usage", usage.completions)),
        ("GET", ROOT + "/costs", usage.open_to("usage", usage.costs)),
        ("GET", ROOT + "/balance", money.open_to("usage", money.balance)),
        ("GET", ROOT + "/credits", money.open_to("usage", money.credits)),
        ("GET", ROOT + "/budgets", money.open_to("usage", money.budgets)),
        ("GET", ROOT + "/invoices", money.open_to("usage", money.invoices)),
        ("GET", invoice, money.open_to("usage", money.invoice)),
        ("GET", invoice + "/file", money.open_to("usage", money.file)),
        ("GET", invoice + "/payments", money.open_to("usage", money.payments)),
        ("GET", ROOT + "/audit_logs", log.open_to("audit", log.page)),
        ("GET", ROOT + "/projects", projects.open_to("admin", projects.page)),
        ("POST", ROOT + "/projects", projects.open_to("admin", projects.create)),
        ("GET", PROJECT, projects.open_to("admin", projects.one)),
        ("GET", PROJECT + "/api_keys", projects.open_to("admin", projects.keys)),
        ("GET", PROJECT + "/api_keys/{key_id}", projects.open_to("admin", projects.key)),
        ("DELETE", PROJECT + "/api_keys/{key_id}", projects.open_to("admin", projects.revoke_key)),
        ("POST", PROJECT + "/service_accounts", projects.open_to("admin", projects.create_account)),
        ("GET", PROJECT + "/rate_limits", projects.open_to("admin", projects.limits)),
        ("POST", PROJECT + "/rate_limits/{rate_limit_id}", projects.open_to("admin", projects.set_limits)),
    )
    return [Route(path, answer, methods=[method]) for method, path, answer in table]
