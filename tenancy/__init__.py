"""The tenancy room: tenants, projects, keys, quotas, prices and the ledger."""
