"""One request, from the socket to the ledger: routes, wire format, admission, exchange, settlement."""
