"""Mutation testing of the checks: small wrong changes of the solutions, each of which a check has to notice."""
