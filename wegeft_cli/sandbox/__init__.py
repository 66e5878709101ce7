"""Sandbox for untrusted programs: fresh processes isolated by Linux namespaces and seccomp.

`run.py` is the interface. `worker.py` is the main program of the fresh processes, `isolation.py`
isolates them, and `channel.py` transfers values between them. The package uses the standard library
alone and is imported only after the user has allowed code execution.
"""
