"""Command-line tools beside the training run. Advice of libraries is silenced before any command imports them."""

from ..quiet import quiet_libraries

quiet_libraries()
