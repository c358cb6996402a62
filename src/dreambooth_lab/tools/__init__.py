"""Command-line tools. Warnings of libraries are silenced before any command imports them."""

from ..quiet import quiet_libraries

quiet_libraries()
