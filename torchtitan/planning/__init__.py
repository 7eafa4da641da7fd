"""A run planned before it costs anything: memory, traffic and time of every rank, on a laptop.

config → ranks → memory, traffic → time → report
"""
