"""A program that tries to escape from the sandbox; its tests name the first layer that fails."""

from __future__ import annotations

from wegeft_cli.sandbox.isolation import Limits

_ATTEMPTS = """
import ctypes, os, resource, socket, sys

libc = ctypes.CDLL(None, use_errno=True)

def refused(call, *kinds):
    try:
        call()
    except kinds:
        return True
    return False

def try_user():
    return [libc.unshare(0x10000000) < 0, libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) < 0,
            refused(lambda: os.setuid(0), OSError) or os.getuid() == 0 and libc.chroot(b"/") < 0]

def try_mount():
    places = ["/", *[p for p in sys.path if os.path.isdir(p)]]
    writes = [refused(lambda p=p: open(p + "/wegeft-attempt", "w"), OSError) for p in places]
    hidden = [not os.path.exists(p) for p in ("/proc", "/sys", "/var", "/run", "/etc/passwd")]
    return [*writes, *hidden, os.listdir("/tmp") == []]

def try_net():
    def connect():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect(("192.0.2.1", 9))
    return [refused(connect, OSError), [name for _, name in socket.if_nameindex()] == ["lo"]]

def try_pid():
    return [os.getpid() == 1, os.getppid() == 0]

def try_syscalls():
    return [libc.shmget(0, 4096, 0o1600) < 0, libc.msgget(0, 0o1600) < 0]

def try_environment():
    return [not os.environ]

def try_memory(limit):
    return [refused(lambda: bytearray(limit), MemoryError)]

def try_files(limit):
    def write():
        with open("/tmp/long", "wb", buffering=0) as f:
            while f.tell() <= limit:
                f.write(bytes(65536))
    done = refused(write, OSError)
    os.unlink("/tmp/long")
    return [done]

def try_processes(limit):
    children, full = [], False
    for _ in range(limit + 1):
        try:
            child = os.fork()
        except OSError:
            full = True
            break
        if child == 0:
            import time
            time.sleep(60)
            os._exit(0)
        children.append(child)
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
    return [full]

def attempt(layer, *arguments):
    return globals()["try_" + layer](*arguments)
"""

_TESTS = """
def check(candidate):
    for layer, *arguments in LAYERS:
        held = candidate(layer, *arguments)
        assert held and all(h is True for h in held), f"{{layer}}: it does not hold ({{held}})"

LAYERS = {layers!r}
"""


def escape_program(limits: Limits) -> dict[str, str]:
    """Return the fields of a `Program` that passes if every isolation layer holds."""
    layers = [
        ("user",),
        ("mount",),
        ("net",),
        ("pid",),
        ("syscalls",),
        ("environment",),
        ("memory", limits.memory_bytes),
        ("files", limits.file_bytes),
        ("processes", limits.processes),
    ]
    tests = _TESTS.format(layers=layers)
    return {"source": _ATTEMPTS, "definitions": "", "tests": tests, "entry_point": "attempt"}
