"""Tilings as data, for all kernels.

`tables` has their form and those that are shipped, `cache` chooses one for a call, `search` and
`command` measure them.
"""
