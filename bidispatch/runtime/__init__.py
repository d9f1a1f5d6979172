"""From a selection to a call: binding kernels, choosing the rung, checking arguments, torch.library ops."""
