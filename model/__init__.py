"""The network under study: sites, local functions, dictionaries, tasks, metrics."""
