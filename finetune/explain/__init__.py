"""Why a network said what it said: one method a file, the drawing apart."""
