"""Whether a map may be shown: what each check measures, and what follows from it."""
