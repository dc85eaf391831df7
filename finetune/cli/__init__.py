"""Commands: each parses, calls one function, and prints. Only this room knows Typer."""
