"""Tilings as data, for all kernels.

`table_format` has their form and finds those that are shipped, `cache` chooses one for a call,
`search` and `command` measure them.
"""
