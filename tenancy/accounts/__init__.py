"""The money: the double-entry ledger, credits, budgets, corrections."""
