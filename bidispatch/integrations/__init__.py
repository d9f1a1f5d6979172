"""Where bidispatch meets frameworks: one package each."""
