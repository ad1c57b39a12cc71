"""Which rows the next step computes: admission, order between and within domains, victims."""
