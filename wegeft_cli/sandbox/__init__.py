"""Programs that nobody has read run here: fresh processes behind walls that the kernel holds.

`run.py` is what the rest of the project calls. `worker.py` is the main program of the fresh
processes, `isolation.py` shuts them in, `channel.py` carries values between them. Nothing here is
imported before a user has allowed code to be run, and nothing but the standard library is used.
"""
