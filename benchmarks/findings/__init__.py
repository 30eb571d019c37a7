"""The paper's findings, examined again on small models: what is run, how, and what comes of it (imports no torch).

``sizes`` has models and budgets, ``matrix`` the questions and their arms, ``claims`` what the paper says of them.
``steps`` makes of both a list of steps that depend on one another, ``commands`` the commands of a step, ``figures``
what is kept of their results. ``order`` says when each step is run and how long all take (``probe``: how fast the
machine is), ``store`` where results are. ``worker`` runs a command in a process that is forked from one with everything
imported (``preload``), ``driver`` runs all of them. ``corpus`` makes the text, ``specialised`` shows what experts are
for, ``terms`` has losses that no flag selects. ``collect``, ``paired``, ``tables``, ``pictures`` and ``report`` make of
results what docs/findings.md has. ``main`` is the command line: ``make findings``.
"""
