"""Router statistics that `metrics.log_routing` adds to the log: the table of their names.

Adding one takes a line here and the function of the same name in models/moe/router_stats.py.
"""

# Name in the log -> factor on the mean over tokens.
ROUTER_STATS: dict[str, float] = {
    "router_balance_loss": 1.0,
    "router_z_loss": 1.0,
    "router_entropy": 1.0,
    "limited_percent": 100.0,
    "router_global_balance_loss": 1.0,
}
