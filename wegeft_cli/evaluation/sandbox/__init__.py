"""Programs that nobody has read run here: fresh processes behind walls that the kernel holds.

`run.py` is what the rest of the project calls. `inside.py` is the main program of the fresh
processes, `walls.py` shuts them in, `carry.py` carries values between them. Nothing here is
imported before a user has allowed code to be run, and nothing but the standard library is used.
"""
