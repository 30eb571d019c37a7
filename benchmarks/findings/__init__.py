"""The paper's findings, examined again on small models: what is run, how, and what comes of it (imports no torch).

``sizes`` has models and budgets, ``matrix`` the questions and their arms, ``claims`` what the paper says of them.
``steps`` makes of both a list of steps that depend on one another, ``commands`` the commands of a step, ``figures`` what is kept of them, ``order`` when
each is run and how long all take, ``store`` where results are. ``worker`` runs a command in a process that is forked
from one with everything imported, ``driver`` runs all of them. ``corpus`` makes the text, ``specialised`` shows what
experts are for, ``terms`` has losses that no flag selects. ``collect``, ``paired``, ``tables``, ``pictures`` and
``report`` make of results what docs/findings.md has. Start it with ``make findings``.
"""
