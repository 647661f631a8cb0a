"""SynCo-v2 as an installed package; ``python -m synco_vit`` and the ``synco-`` commands run it."""
