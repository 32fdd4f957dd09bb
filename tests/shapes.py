"""Which checker watches types and shapes while tests run?"""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# An int is welcome where a float is asked for, as PEP 484 has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
