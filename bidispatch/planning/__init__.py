"""From a device, a profile and the registry to a plan: what serves each problem, and why."""
