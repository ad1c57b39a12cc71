"""Planted engine faults and what would have caught them: `bulkhead audit kill-matrix`. Nothing here serves requests."""
