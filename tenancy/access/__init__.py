"""Who may: organisations, tenants, projects, keys and operators."""
