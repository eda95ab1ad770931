"""Stands for the Python package krb5 where pyspnego imports it.

pyspnego needs it for tickets from passwords and from named caches only; these tests use the default cache, which is
GSSAPI's own business. The package itself would have to be compiled with every run of the tests.
"""


def __getattr__(name):
    raise AttributeError(f"the tests use no function of the package krb5, but {name} was asked for")
