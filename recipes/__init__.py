"""Complete runs as YAML; each opens with its command, its source and what each knob costs."""
