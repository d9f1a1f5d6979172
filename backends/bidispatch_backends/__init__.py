"""The backends that come with bidispatch, each a light register() and modules that load when a kernel is bound."""
