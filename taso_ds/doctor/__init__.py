"""What on this machine would break a job, found before it is queued: one file per kind of check, one table.

A check asks the machine itself (it compiles, binds, renames, connects) and returns findings; it does not raise for
what it finds. No module needs torch to be imported, so a broken installation is reported, not met.
"""
