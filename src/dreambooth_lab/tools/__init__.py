"""Command-line tools. Warnings of libraries are silenced before any command imports them."""

from ..library_warnings import silence_libraries

silence_libraries()
